"""Find the tables that could serve a layer: read from folders of both engines' dialects, and told apart.

Reads files and nothing else: the caller knows the layer, the GPU and the folders.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_moe_ext.core import Gpu, MoEShape, Table, TableError
from sglang_moe_ext.engines.sglang import table_names
from sglang_moe_ext.engines.table_names import TableNaming, other_spelling
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.tables import config_table, provenance
from sglang_moe_ext.tables.config_table import LoadedTable
from sglang_moe_ext.tables.provenance import Provenance
from sglang_moe_ext.untrusted import show

log = logging.getLogger(__name__)

Options = Mapping[int, Mapping[str, Any]]
"""Launch options of a table's entries that a TileConfig does not have, by M."""


@dataclass(frozen=True, slots=True)
class TableDir:
    """A root with one folder `triton_X_Y_Z` of tables for each Triton, or a folder of tables itself if it `is_flat`.

    `is_engines`: the engine reads it itself; `is_asked_for`: the user named it to the engine, so it comes first.
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

    `known` None: the table has no provenance, so it is the engine's own or was put there by hand. `up` is empty if all
    of its entries were made for another layer. `is_misspelt`: its name is spelt as the other engine does, so that the
    engine alone does not find it. `remarks`: what is odd about the files, for a log and for doctor.
    """

    table_dir: TableDir
    path: Path
    device_name: str
    is_alias: bool
    is_exact_triton: bool
    up: Table
    known: Provenance | None
    down: Table | None
    up_options: Options = field(default_factory=dict)
    down_options: Options = field(default_factory=dict)
    is_misspelt: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def made_with(self) -> str:
        """The folder of the Triton that it was made with."""
        return _made_with(self.table_dir, self.path.parent, self.known)


@dataclass(frozen=True, slots=True)
class FoundTables:
    """All the tables for one layer on one GPU, in the order of their folders, for any number of tokens.

    `remarks`: what is odd about files that could not be used.
    """

    candidates: tuple[TableCandidate, ...]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TableQuery:
    """What is searched for. `any_layer`: accept entries for any hidden size and top-k; a file's name tells neither."""

    shape: MoEShape
    running_folder: str
    any_layer: bool


def search(
    shape: MoEShape,
    device_name: str,
    gpu: Gpu | None,
    triton: str,
    table_dirs: Sequence[TableDir],
    *,
    any_layer: bool = False,
) -> FoundTables:
    """Read the tables for that layer. A file that cannot be read as a table is skipped with one log line."""
    others = specs.aliases(gpu) if gpu is not None and specs.is_called(gpu, device_name) else []
    names = [device_name, *(name for name in others if name != device_name)]
    query = TableQuery(shape, table_names.version_folder(triton), any_layer)
    candidates: list[TableCandidate] = []
    remarks: list[str] = []
    for table_dir in table_dirs:
        for name in _distinct_names(names, shape, table_dir.dialect):
            for folder in _version_folders(table_dir):
                try:
                    found = _read_candidate(table_dir, folder, name, name != device_name, query)
                except (TableError, OSError) as error:
                    remarks.append(f"passes over a table: {error}")
                    continue
                if found is not None:
                    candidates.append(found)
                    remarks += found.remarks
    for remark in remarks:
        log.warning("sglang-moe-ext: %s", remark)
    return FoundTables(tuple(candidates), tuple(remarks))


def _distinct_names(names: Sequence[str], shape: MoEShape, dialect: TableNaming) -> list[str]:
    """The GPUs whose tables have different file names: every H200 is one to vLLM."""
    first = {dialect.file_name(dialect.key(shape, name)): name for name in reversed(names)}
    return list(reversed(first.values()))


def _version_folders(table_dir: TableDir) -> list[Path]:
    """Newest Triton first, as the engine searches them.

    An own build of Triton, such as 3.7.1+git9f3a2b1c, has a folder in our stores. In the engine's own folder such a
    name ends SGLang's lookup, and is not read.
    """
    if table_dir.is_flat:
        return [table_dir.root]
    is_version = table_names.is_version_folder if table_dir.is_engines else table_names.is_any_version_folder
    try:
        folders = [folder for folder in table_dir.root.iterdir() if is_version(folder.name)]
    except OSError:
        return []  # a folder that is missing or closed has no tables
    return sorted(folders, key=lambda folder: [int(part) for part in re.findall(r"\d+", folder.name)], reverse=True)


def _find_file(folder: Path, name: str) -> tuple[Path, str | None] | None:
    """The file of that name, or spelt as the other engine spells it, with a remark; None if there is neither."""
    if os.path.lexists(path := folder / name):
        return path, None
    other = other_spelling(name)
    if other is not None and os.path.lexists(path := folder / other):
        return path, f"{show(str(path))} is spelt as the other engine does: the engine alone looks for {name}"
    return None


def _read_candidate(
    table_dir: TableDir, folder: Path, device_name: str, is_alias: bool, query: TableQuery
) -> TableCandidate | None:
    """Raises TableError or OSError if the table of the up projection cannot be read."""
    dialect = table_dir.dialect
    name = dialect.file_name(dialect.key(query.shape, device_name))
    file = _find_file(folder, name)
    if file is None:
        return None
    path, misspelt = file
    loaded, known = config_table.load(path), provenance.read(path)
    remarks = [*([] if misspelt is None else [misspelt]), *_remarks(path, loaded, dialect, known)]
    down, down_options = None, {}
    if dialect.has_down and (down_file := _find_file(folder, name.removesuffix(".json") + "_down.json")) is not None:
        down_path = down_file[0]
        try:
            loaded_down, known_down = config_table.load(down_path), provenance.read(down_path)
        except (TableError, OSError) as error:
            remarks.append(f"passes over a table of the down projection: {error}")
        else:
            remarks += _remarks(down_path, loaded_down, dialect, known_down)
            down, down_options = _select_layer(loaded_down.table, known_down, query), dict(loaded_down.options)
    up = _select_layer(loaded.table, known, query)
    is_exact = _made_with(table_dir, folder, known) == query.running_folder
    options, is_misspelt = (loaded.options, down_options), misspelt is not None
    return TableCandidate(
        table_dir, path, device_name, is_alias, is_exact, up, known, down, *options, is_misspelt, tuple(remarks)
    )


def _remarks(path: Path, loaded: LoadedTable, dialect: TableNaming, known: Provenance | None) -> list[str]:
    name = show(str(path))
    foreign = [key for key in loaded.foreign_keys if key not in dialect.metadata_keys]
    found = [f"{name}: {remark}" for remark in loaded.remarks]
    if foreign:
        found.append(f"{name}: the engine alone cannot read it, {show(', '.join(foreign))} is no number of tokens")
    if loaded.has_byte_order_mark:
        found.append(f"{name}: the engine alone cannot read it, it begins with a byte order mark")
    if known is not None and known.broken is not None:
        found.append(f"{known.broken}; until then {name} is worth no more than a predicted table")
    return found


def _made_with(table_dir: TableDir, folder: Path, known: Provenance | None) -> str:
    if not table_dir.is_flat:
        return folder.name
    run = None if known is None else next((entry.run for entry in known.entries.values()), None)
    return "an unknown Triton" if run is None or not run.triton else table_names.version_folder(run.triton)


def _select_layer(table: Table, known: Provenance | None, query: TableQuery) -> Table:
    """Its entries that were made for this hidden size and top-k: the file's name tells neither."""
    entries = {} if known is None or query.any_layer else known.entries
    return {m: it for m, it in table.items() if m not in entries or is_made_for(entries[m].run.shape, query.shape)}


def is_made_for(made_for: object, shape: MoEShape) -> bool:
    """Whether it was made for this hidden size and top-k.

    `made_for` is a shape as text, or whatever else a file has there. It is not parsed: a shape of few experts is no
    valid --shape.
    """
    return f",K={shape.hidden_size},topk={shape.top_k}," in str(made_for)
