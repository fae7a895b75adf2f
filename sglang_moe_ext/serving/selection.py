"""Which configuration a layer runs at each number of tokens: of the user's tables, the shipped, or the engine's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sglang_moe_ext.core import Table, TileConfig
from sglang_moe_ext.engines import running
from sglang_moe_ext.engines.lookup_args import LookupLayer
from sglang_moe_ext.serving import table_search
from sglang_moe_ext.serving.table_search import FoundTables, TableCandidate, TableDir
from sglang_moe_ext.tables import config_table

SATURATED_TOKENS = 4096
"""From here on every expert has whole tiles of rows, and more tokens mean more of the same tiles."""
_FARTHEST = 2.0
"""A table covers the numbers of tokens within this ratio of one that it was made for."""
_STANDING = {"transferred": 1, "predicted": 2}
"""After what was measured, and what is of unknown origin: an engine ships it, or a user put it there."""


@dataclass(frozen=True, slots=True)
class OurEntry:
    """A configuration of one of our tables; no `down`: both GEMMs run `up`.

    `entry` is the M that it was made for, `origin` what is known of it: measured or predicted, and for what else.
    """

    up: TileConfig
    down: TileConfig | None
    most_block_m: int
    table_dir: str
    path: Path
    entry: int
    origin: str

    @property
    def why(self) -> str:
        """The same for all entries of one table: a log says it once."""
        return f"{self.table_dir} table {self.path} ({self.origin})"


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """The engine's own lookup knows no worse."""

    why: str


@dataclass(frozen=True, slots=True)
class EngineDefault:
    """The engine's lookup would take a far neighbour out of a table of ours; its default is the better guess."""

    why: str


Choice = OurEntry | EngineEntry | EngineDefault


def covers(table: Table, tokens: int) -> bool:
    """Whether the entry that is nearest was made for about as many tokens."""
    key = config_table.nearest(table, tokens)
    if tokens > key:
        return tokens <= _FARTHEST * key or key >= SATURATED_TOKENS
    return key <= _FARTHEST * tokens


def select(tables: FoundTables, tokens: int) -> Choice:
    """What was asked for, then measured before predicted, this GPU and this Triton before others, then by folder."""
    read = _read_by_engine(tables)
    theirs = read if read is not None and read.known is None else None
    fitting = [one for one in tables.candidates if one.up and (one is theirs or covers(one.up, tokens))]
    if not fitting:
        # Not the number: this is logged once for all of them.
        why = "no table is for this many tokens" if any(one.up for one in tables.candidates) else "there is no table"
        return EngineEntry(why) if read is None else EngineDefault(why)
    # The first of equals: candidates lie in the order of table_dirs.
    best = min(fitting, key=lambda one: _rank(one, tokens))
    if best is theirs:
        return EngineEntry(f"its own table {best.path.parent.name}/{best.path.name} stands before any of ours")
    return _of(best, tokens)


def _read_by_engine(tables: FoundTables) -> TableCandidate | None:
    """What the engine's own lookup takes of its folders, for this GPU's name.

    Where Tritons have folders, its Triton's table or else the newest; where they have none, the first that there is.
    """
    own = [one for one in tables.candidates if one.table_dir.is_engines and not one.is_alias]
    exact = next((one for one in own if one.is_exact_triton and not one.table_dir.is_flat), None)
    return exact or (own[0] if own else None)


def best_table(tables: FoundTables) -> TableCandidate | None:
    """The table that stands before all others, whatever the number of tokens; None where that is the engine's own."""
    found = [one for one in tables.candidates if one.up]
    best = min(found, key=lambda one: _rank(one, next(iter(one.up))), default=None)
    return None if best is not None and best is _read_by_engine(tables) and best.known is None else best


def _origin(candidate: TableCandidate, tokens: int) -> str:
    return (candidate.known and candidate.known.origin(config_table.nearest(candidate.up, tokens))) or "origin unknown"


def _rank(candidate: TableCandidate, tokens: int) -> tuple[int, ...]:
    standing = _STANDING.get(_origin(candidate, tokens), 0)
    return not candidate.table_dir.is_asked_for, standing, candidate.is_alias, not candidate.is_exact_triton


def _of(candidate: TableCandidate, tokens: int) -> OurEntry:
    up = candidate.up[config_table.nearest(candidate.up, tokens)]
    down = None
    if candidate.down and covers(candidate.down, tokens):
        nearest = candidate.down[config_table.nearest(candidate.down, tokens)]
        # Both GEMMs share one sort of the tokens.
        down = nearest if nearest.block_m == up.block_m else None
    most_block_m = max(config.block_m for config in (candidate.down or candidate.up).values())
    triton = "" if candidate.is_exact_triton else f", made with {candidate.made_with}"
    device = f", made for {candidate.device_name}" if candidate.is_alias else ""
    return OurEntry(
        up,
        down,
        most_block_m,
        table_dir=candidate.table_dir.name,
        path=candidate.path,
        entry=config_table.nearest(candidate.up, tokens),
        origin=f"{_origin(candidate, tokens)}{device}{triton}",
    )


log = logging.getLogger(__name__)


class RunningEngine(Protocol):
    """What is asked of a running engine."""

    @property
    def triton(self) -> str | None: ...

    def is_deterministic(self) -> bool: ...

    def device_name(self) -> str | None: ...


class TableSelector:
    """Reads the tables of a layer when it first asks."""

    def __init__(self, engine: RunningEngine, table_dirs: Callable[[], Sequence[TableDir]]) -> None:
        self._engine, self._table_dirs = engine, table_dirs
        self._tables: dict[LookupLayer, FoundTables | None] = {}
        self._said: set[tuple[LookupLayer, str]] = set()

    def of(self, layer: LookupLayer, tokens: int) -> Choice:
        """Which configuration runs, before any guard looks at it."""
        if self._engine.is_deterministic():
            return EngineEntry("deterministic inference reads no table")
        found = self.tables(layer)
        if found is None:
            return EngineEntry("no tables are known for this kind of layer or GPU")
        return select(found, tokens)

    def tables(self, layer: LookupLayer) -> FoundTables | None:
        """The tables for it, read once."""
        if layer not in self._tables:
            self._tables[layer] = self.search(layer)
        return self._tables[layer]

    def search(self, layer: LookupLayer, *, any_layer: bool = False) -> FoundTables | None:
        """The tables for it, read now; None where it is of a kind, or on a GPU, that has none."""
        shape, device_name, triton = layer.shape(), self._engine.device_name(), self._engine.triton
        if shape is None or device_name is None or triton is None:
            return None
        gpu = running.running_gpu(device_name)
        return table_search.search(shape, device_name, gpu, triton, self._table_dirs(), any_layer=any_layer)

    def say(self, layer: LookupLayer, choice: Choice) -> None:
        """One line for each reason of each layer."""
        if (layer, choice.why) not in self._said:
            self._said.add((layer, choice.why))
            log.info("sglang-moe-ext: %s: %s", layer.shape() or layer, describe(choice))

    def forget(self) -> None:
        """Read all tables anew."""
        self._tables.clear()


def describe(choice: Choice) -> str:
    """What a log says of a choice."""
    match choice:
        case OurEntry():
            return choice.why
        case EngineDefault():
            return f"the engine's default, {choice.why}"
        case EngineEntry():
            return f"the engine's own choice, {choice.why}"
