"""Find and remove what this package has written: into the engines' folders, and into the user's own store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext.core import StoreError
from sglang_moe_ext.engines.sglang import installation as sglang
from sglang_moe_ext.engines.vllm import installation as vllm
from sglang_moe_ext.tables import config_table, files, provenance, user_store
from sglang_moe_ext.tuning.compile import cache


@dataclass(frozen=True, slots=True)
class WrittenTable:
    """A table of this package in an engine's folder, by its entries: this package's, and those that are not."""

    path: Path
    ours: frozenset[int]
    others: frozenset[int]

    @property
    def sidecar(self) -> Path:
        return provenance.sidecar(self.path)


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What can be removed: tables in engines' folders, unfinished files beside them, and whole folders of the user."""

    tables: tuple[WrittenTable, ...]
    unfinished: tuple[Path, ...]
    folders: tuple[Path, ...]


def engine_folders() -> list[Path]:
    """The folders that hold the tables of each engine that is installed here."""
    found: list[Path] = []
    if (engine := sglang.find()) is not None and engine.configs_root.is_dir():
        found += sorted(path for path in engine.configs_root.iterdir() if path.is_dir())
    if (other := vllm.find()) is not None and other.configs_folder.is_dir():
        found.append(other.configs_folder)
    return found


def find(*, with_store: bool) -> Leftovers:
    """What this package has written. `with_store`: the user's own store and the compiler's cache as well."""
    folders = engine_folders()
    own = user_store.root_if_any()
    of_user = [] if own is None else [own] if with_store else [own / "overlay"]
    of_user += [cache.default_path().parent] if with_store else []
    return Leftovers(
        tables=tuple(table for folder in folders for table in _tables(folder)),
        unfinished=tuple(path for folder in folders for path in sorted(folder.glob(".*.tmp"))),
        folders=tuple(folder for folder in of_user if folder.is_dir()),
    )


def _tables(folder: Path) -> Iterator[WrittenTable]:
    for sidecar in sorted(folder.glob("*.provenance.json")):
        path = sidecar.with_name(sidecar.name.replace(".provenance.json", ".json"))
        known = provenance.read(path)
        if known is None:
            continue
        entries = frozenset(config_table.read(path) if path.exists() else {})
        yield WrittenTable(path, entries & known.entries.keys(), entries - known.entries.keys())


def _without(table: WrittenTable) -> str:
    """The file's text without the entries of this package, in the engine's own dialect."""
    document = json.loads(files.read_bounded(table.path))
    kept = {key: value for key, value in document.items() if not (key.isdecimal() and int(key) in table.ours)}
    return json.dumps(kept, indent=4) + "\n"


def remove(found: Leftovers) -> None:
    """Remove all of it. A table keeps the entries that are not this package's.

    Raises:
        StoreError: a file cannot be removed or written.
    """
    path = Path()
    try:
        for table in found.tables:
            path = table.path
            if table.others:
                files.write_together({table.path: _without(table)})
            else:
                table.path.unlink(missing_ok=True)
            table.sidecar.unlink(missing_ok=True)
        for path in found.unfinished:
            path.unlink(missing_ok=True)
        for path in found.folders:
            shutil.rmtree(path)
    except OSError as error:
        raise StoreError(f"cannot remove {path}: {error.strerror}; remove it by hand") from error
