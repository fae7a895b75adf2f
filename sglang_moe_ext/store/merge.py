"""Put a new table into the place of an old one, entry by entry; nothing measured is ever lost to a prediction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sglang_moe_ext.core import Table
from sglang_moe_ext.store import files, provenance, tables
from sglang_moe_ext.store.provenance import Provenance


@dataclass(frozen=True, slots=True)
class Stored:
    """A table with what is known of it; without provenance it is the engine's or a user's, and counts as measured."""

    table: Table
    provenance: Provenance | None

    def has_measured(self) -> bool:
        """True where some entry is not known to be a mere prediction."""
        known = self.provenance
        return known is None or any(known.origin(m) != "predicted" for m in self.table)

    def without_predictions(self) -> Stored:
        """The entries that are not known to be mere predictions."""
        known = self.provenance
        kept = {m: config for m, config in self.table.items() if known is None or known.origin(m) != "predicted"}
        return Stored(kept, known and Provenance({m: entry for m, entry in known.entries.items() if m in kept}))


@dataclass(frozen=True, slots=True)
class Refused:
    """Why the new table was not put there."""

    why: str


def read(path: Path) -> Stored | None:
    """What lies at that place, or None.

    Raises:
        TableError: something lies there that is no table.
    """
    if not path.exists():
        return None
    return Stored(tables.read(path), provenance.read(path))


def merged(old: Stored | None, new: Stored) -> Stored | Refused:
    """The two as one: of an M in both, the new entry. A prediction is refused wherever a measurement lies.

    It is refused whole, also for an M that the old table lacks: the engine takes the nearest entry, so each key that is
    added changes what the tokens around it run.
    """
    if old is None:
        return new
    if old.has_measured():
        if not new.has_measured():
            return Refused("a measured table already lies there, and a predicted one never replaces it")
        new = new.without_predictions()
    table = dict(sorted({**old.table, **new.table}.items()))
    known = (
        {}
        if old.provenance is None
        else {m: entry for m, entry in old.provenance.entries.items() if m not in new.table}
    )
    fresh = {} if new.provenance is None else new.provenance.entries
    return Stored(table, Provenance({m: entry for m, entry in sorted({**known, **fresh}.items()) if m in table}))


def paired(up: Stored | Refused, down: Stored | Refused) -> tuple[Stored | Refused, Stored | Refused]:
    """The tables of the up and the down projection as an engine reads them together: both of them or none.

    Both GEMMs share one sort of the tokens, so at each M there must be one BLOCK_SIZE_M: SGLang up to 0.5.12 ends the
    server otherwise. With the same keys in both, whatever is nearest in one is nearest in the other.
    """
    if isinstance(up, Refused):
        return up, up
    if isinstance(down, Refused):
        return down, down
    keys = sorted({*up.table, *down.table})
    up, down = _with_keys(up, keys), _with_keys(down, keys)
    sorted_alike = {m: replace(config, block_m=up.table[m].block_m) for m, config in down.table.items()}
    return up, Stored(sorted_alike, down.provenance)


def _with_keys(stored: Stored, keys: Sequence[int]) -> Stored:
    """The table with more keys, each with the entry that was nearest to it."""
    source = {m: tables.nearest(stored.table, m) for m in keys}
    known = {} if stored.provenance is None else stored.provenance.entries
    entries = {m: known[origin] for m, origin in source.items() if origin in known}
    table = {m: stored.table[origin] for m, origin in source.items()}
    return Stored(table, stored.provenance and Provenance(entries))


def put(changes: dict[Path, Stored], pairs: Iterable[tuple[Path, Path]] = ()) -> dict[Path, Stored | Refused]:
    """Merge each table into its place and write all of them, or none where the disk refuses.

    `pairs`: which of the places are the up and the down table of one layer.

    Raises:
        StoreError: the disk refuses.
        TableError: what lies at a place is no table.
    """
    results = {path: merged(read(path), new) for path, new in changes.items()}
    for up, down in pairs:
        results[up], results[down] = paired(results[up], results[down])
    contents: dict[Path, str] = {}
    for path, result in results.items():
        if isinstance(result, Stored):
            if result.provenance is not None:
                contents[provenance.sidecar(path)] = provenance.to_json(result.provenance)
            contents[path] = tables.to_json(result.table)
    if contents:
        files.write_together(contents)
    return results
