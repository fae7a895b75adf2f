"""Put a new table into the place of an old one, entry by entry; none is ever lost to one that is worth less."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from sglang_moe_ext.core import Origin, StoreError, Table, TileConfig
from sglang_moe_ext.tables import config_table, files, provenance, user_store
from sglang_moe_ext.tables.provenance import Provenance

_ORIGINS: tuple[Origin, ...] = get_args(Origin)


@dataclass(frozen=True, slots=True)
class StoredTable:
    """A table with what is known of it.

    Without provenance it is the engine's or a user's, and counts as measured. With provenance that cannot be read it is
    worth no more than a predicted one, and a predicted one never replaces it: it may have been measured.
    """

    table: Table
    provenance: Provenance | None

    def _worth(self, tokens: int) -> int:
        if self.is_broken():
            return -_ORIGINS.index("predicted")
        known = None if self.provenance is None else self.provenance.origin(tokens)
        return 0 if known is None else -_ORIGINS.index(known)

    def worth(self) -> int:
        """Of its best entry: 0 where some entry was measured, or may have been; less where none was."""
        return max(map(self._worth, self.table), default=0)

    def has_measured(self) -> bool:
        """True where some entry is not known to be other than measured."""
        return self.worth() == 0

    def is_broken(self) -> bool:
        """Whether its provenance cannot be read."""
        return self.provenance is not None and self.provenance.broken is not None

    def of_worth(self, least: int) -> StoredTable:
        """The entries that are worth so much."""
        kept, known = {m: of for m, of in self.table.items() if self._worth(m) >= least}, self.provenance
        return StoredTable(kept, known and Provenance({m: entry for m, entry in known.entries.items() if m in kept}))


@dataclass(frozen=True, slots=True)
class RefusedTable:
    """Why the new table was not put there."""

    why: str


def read(path: Path) -> StoredTable | None:
    """What lies at that place, or None.

    Raises:
        TableError: something lies there that is no table.
    """
    try:
        if not path.exists():
            return None
    except OSError as error:
        raise StoreError(f"cannot look at {path}: {error.strerror}; choose another place with --output-dir") from error
    return StoredTable(config_table.read(path), provenance.read(path))


def merge_tables(old: StoredTable | None, new: StoredTable) -> StoredTable | RefusedTable:
    """The two as one: of an M in both, the new entry. What is worth less is refused wherever something better lies.

    It is refused whole, also for an M that the old table lacks: the engine takes the nearest entry, so each key that is
    added changes what the tokens around it run.
    """
    if old is None:
        return new
    least = 0 if old.is_broken() else old.worth()
    if new.worth() < least:
        there, ours = _ORIGINS[-least], _ORIGINS[-new.worth()]
        return RefusedTable(f"a {there} table already lies there, and a {ours} one never replaces it")
    new = new.of_worth(least)
    table = dict(sorted({**old.table, **new.table}.items()))
    known = (
        {}
        if old.provenance is None
        else {m: entry for m, entry in old.provenance.entries.items() if m not in new.table}
    )
    fresh = {} if new.provenance is None else new.provenance.entries
    return StoredTable(table, Provenance({m: entry for m, entry in sorted({**known, **fresh}.items()) if m in table}))


def check_pair(
    up: StoredTable | RefusedTable, down: StoredTable | RefusedTable
) -> tuple[StoredTable | RefusedTable, StoredTable | RefusedTable]:
    """The tables of the up and the down projection as an engine reads them together: both of them or none.

    Both GEMMs share one sort of the tokens, so at each M there must be one BLOCK_SIZE_M: SGLang up to 0.5.12 ends the
    server otherwise. With the same keys in both, whatever is nearest in one is nearest in the other.
    """
    if isinstance(up, RefusedTable):
        return up, up
    if isinstance(down, RefusedTable):
        return down, down
    fitting = {m: config for m, config in down.table.items() if config.block_m == _at(up, m).block_m}
    keys = sorted({*up.table, *down.table})
    # Without an entry of its own the down projection runs the up projection's, so that is what stands in for one.
    down_table = {m: fitting.get(m) or replace(_at(up, m), use_tma=False) for m in keys}
    known = {} if down.provenance is None else down.provenance.entries
    down_known = down.provenance and Provenance({m: entry for m, entry in known.items() if m in fitting})
    return StoredTable({m: _at(up, m) for m in keys}, up.provenance), StoredTable(down_table, down_known)


def _at(stored: StoredTable, tokens: int) -> TileConfig:
    """The entry that an engine takes for that many tokens."""
    return stored.table[config_table.nearest(stored.table, tokens)]


def put(
    changes: dict[Path, StoredTable],
    pairs: Iterable[tuple[Path, Path]] = (),
    text: Callable[[Table], str] = config_table.to_json,
) -> dict[Path, StoredTable | RefusedTable]:
    """Merge each table into its place and write all of them, or none where the disk refuses. Processes take turns.

    `pairs`: which of the places are the up and the down table of one layer; `text`: a table in its engine's dialect.

    Raises:
        StoreError: the disk refuses.
        TableError: what lies at a place is no table.
    """
    pairs = list(pairs)
    with user_store.locked({path.parent for path in changes}):
        for folder in {path.parent for path in changes}:
            _recover(folder, text)
        results = {path: merge_tables(read(path), new) for path, new in changes.items()}
        for up, down in pairs:
            results[up], results[down] = check_pair(results[up], results[down])
        kept = {path: result for path, result in results.items() if isinstance(result, StoredTable)}
        _write(kept, [(up, down) for up, down in pairs if up in kept and not _fits(read(down), kept[up])], text)
    return results


def _fits(down: StoredTable | None, up: StoredTable) -> bool:
    """Whether the two are sound together: at each M the nearest entries of both have one BLOCK_SIZE_M."""
    if down is None:
        return True
    return down.table.keys() == up.table.keys() and all(
        config.block_m == up.table[m].block_m for m, config in down.table.items()
    )


def _write(tables: dict[Path, StoredTable], pairs: Iterable[tuple[Path, Path]], text: Callable[[Table], str]) -> None:
    contents: dict[Path, str] = {}
    for path, stored in tables.items():
        if stored.provenance is not None:
            contents[provenance.sidecar(path)] = provenance.to_json(stored.provenance)
        contents[path] = text(stored.table)
    if contents:
        files.write_together(contents, pairs)


def _recover(folder: Path, text: Callable[[Table], str]) -> None:
    """Mend what a killed process left: staged files, and a down table that was set aside, and never replaced."""
    files.remove_leftovers(folder)
    for down in files.tables_set_aside(folder):
        aside, up = files.set_aside(down), down.with_name(down.name.replace("_down.json", ".json"))
        if not os.path.lexists(down) and up.exists():
            pair = check_pair(_read_known(up, up), _read_known(aside, down))
            _write(
                {path: it for path, it in zip((up, down), pair, strict=True) if isinstance(it, StoredTable)}, [], text
            )
        aside.unlink(missing_ok=True)


def _read_known(path: Path, table: Path) -> StoredTable:
    """The table in `path`, with the provenance of `table`."""
    return StoredTable(config_table.read(path), provenance.read(table))
