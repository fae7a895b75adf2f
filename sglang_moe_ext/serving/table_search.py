"""The tables that could serve a layer: read from where they lie, in the dialects of both engines, and told apart.

Pure but for reading tables: who calls it knows the layer, the GPU and the places.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext.core import Gpu, MoEShape, Table, TableError
from sglang_moe_ext.engines.sglang import table_names
from sglang_moe_ext.engines.table_names import TableNaming
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.tables import config_table, provenance
from sglang_moe_ext.tables.provenance import Provenance

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TableDir:
    """Folders `triton_X_Y_Z` of tables under one root, or tables themselves where it `is_flat`.

    `is_engines`: what the engine itself reads; `is_asked_for`: the user named it to the engine, so it comes first.
    """

    name: str
    root: Path
    is_engines: bool = False
    is_asked_for: bool = False
    is_flat: bool = False
    dialect: TableNaming = table_names.NAMING


@dataclass(frozen=True, slots=True)
class TableCandidate:
    """A table that could serve a layer, with the table for its down projection alone, if there is one.

    `known` None: nobody knows where it comes from, so it is the engine's own, or was put there by hand. `up` is empty
    where all of it was made for another layer.
    """

    table_dir: TableDir
    path: Path
    device_name: str
    is_alias: bool
    is_exact_triton: bool
    up: Table
    known: Provenance | None
    down: Table | None

    @property
    def made_with(self) -> str:
        """The folder of the Triton that it was made with."""
        return _made_with(self.table_dir, self.path.parent, self.known)


@dataclass(frozen=True, slots=True)
class FoundTables:
    """All the tables for one layer on one GPU, best place first, whatever the number of tokens."""

    candidates: tuple[TableCandidate, ...]


def search(
    shape: MoEShape,
    device_name: str,
    gpu: Gpu | None,
    triton: str,
    table_dirs: Sequence[TableDir],
    *,
    any_layer: bool = False,
) -> FoundTables:
    """Read what lies at the places for that layer. What cannot be read as a table is passed over, with one line.

    `any_layer`: whatever hidden size and top-k its entries were made for; the names of tables tell neither.
    """
    others = [] if gpu is None or gpu.device_name != device_name else specs.aliases(gpu)
    names = [device_name, *(name for name in others if name != device_name)]
    running = table_names.version_folder(triton)
    found = [
        candidate
        for table_dir in table_dirs
        for name in _told_apart(names, shape, table_dir.dialect)
        for folder in _folders(table_dir)
        if (candidate := _candidate(table_dir, folder, shape, name, name != device_name, running, any_layer=any_layer))
        is not None
    ]
    return FoundTables(tuple(found))


def _told_apart(names: Sequence[str], shape: MoEShape, dialect: TableNaming) -> list[str]:
    """The GPUs whose tables have names of their own: all H200 are one to vLLM."""
    first = {dialect.file_name(dialect.key(shape, name)): name for name in reversed(names)}
    return list(reversed(first.values()))


def _folders(table_dir: TableDir) -> list[Path]:
    """Newest Triton first, as the engine searches them."""
    if table_dir.is_flat:
        return [table_dir.root]
    try:
        folders = [folder for folder in table_dir.root.iterdir() if table_names.is_version_folder(folder.name)]
    except OSError:
        return []  # a place that is missing or closed has no tables
    return sorted(folders, key=lambda folder: [int(part) for part in folder.name.split("_")[1:]], reverse=True)


def _candidate(
    table_dir: TableDir,
    folder: Path,
    shape: MoEShape,
    device_name: str,
    is_alias: bool,
    running: str,
    *,
    any_layer: bool,
) -> TableCandidate | None:
    dialect = table_dir.dialect
    path = folder / dialect.file_name(dialect.key(shape, device_name))
    try:
        if not path.exists():
            return None
        known = provenance.read(path)
        up, down = config_table.read(path), None
        down_path = path.with_name(f"{path.stem}_down.json")
        if dialect.has_down and down_path.exists():
            down = config_table.read(down_path)
            down = down if any_layer else _of_layer(down, provenance.read(down_path), shape)
    except (TableError, OSError) as error:
        log.warning("sglang-moe-ext passes over a table: %s", error)
        return None
    up = up if any_layer else _of_layer(up, known, shape)
    is_exact = _made_with(table_dir, folder, known) == running
    return TableCandidate(table_dir, path, device_name, is_alias, is_exact, up, known, down)


def _made_with(table_dir: TableDir, folder: Path, known: Provenance | None) -> str:
    if not table_dir.is_flat:
        return folder.name
    run = None if known is None else next((entry.run for entry in known.entries.values()), None)
    return "an unknown Triton" if run is None or not run.triton else table_names.version_folder(run.triton)


def _of_layer(table: Table, known: Provenance | None, shape: MoEShape) -> Table:
    """Its entries that were made for this hidden size and top-k: the file's name tells neither."""
    entries = {} if known is None else known.entries
    return {m: config for m, config in table.items() if m not in entries or is_made_for(entries[m].run.shape, shape)}


def is_made_for(made_for: object, shape: MoEShape) -> bool:
    """Whether it was made for this hidden size and top-k.

    `made_for` is a shape as text, or whatever else a file has there. No parser: one of few experts is no --shape.
    """
    return f",K={shape.hidden_size},topk={shape.top_k}," in str(made_for)
