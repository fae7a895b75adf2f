"""Which configuration a layer runs at each number of tokens: of the user's tables, the shipped, or the engine's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from sglang_moe_ext import env
from sglang_moe_ext.core import Table, TileConfig
from sglang_moe_ext.engines import running_engine
from sglang_moe_ext.engines.lookup_args import LookupLayer
from sglang_moe_ext.serving import table_search
from sglang_moe_ext.serving.table_search import FoundTables, TableCandidate, TableDir
from sglang_moe_ext.tables import config_table
from sglang_moe_ext.untrusted import show

SATURATED_TOKENS = 4096
"""From here on every expert has whole tiles of rows, and more tokens mean more of the same tiles."""
_FARTHEST = 2.0
"""A table covers the numbers of tokens within this ratio of one that it was made for."""
_STANDING = {"measured": 0, "transferred": 1, "predicted": 2}
"""A smaller number stands first. A table without provenance stands with the measured: an engine ships it, or a user put
it there by hand."""


@dataclass(frozen=True, slots=True)
class OurEntry:
    """A configuration of one of our tables; no `down`: both GEMMs run `up`.

    `table_dir` is the folder's name, `entry` the M that the configuration was made for, `origin` how it came to be. The
    options are launch options beside the tile, as the table has them.
    """

    up: TileConfig
    down: TileConfig | None
    most_block_m: int
    table_dir: str
    path: Path
    entry: int
    origin: str
    up_options: Mapping[str, Any] = field(default_factory=dict, compare=False)
    down_options: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def why(self) -> str:
        """The same for all entries of one table: a log says it once."""
        return f"{self.table_dir} table {show(str(self.path))} ({self.origin})"


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """Use the engine's own lookup. `instead`: what to use if that raises; None: the engine's default."""

    why: str
    instead: OurEntry | None = None


@dataclass(frozen=True, slots=True)
class EngineDefault:
    """Use the engine's default: its own lookup would take a far neighbour from a table of ours."""

    why: str


Choice = OurEntry | EngineEntry | EngineDefault


def covers(table: Table, tokens: int) -> bool:
    """Whether the nearest entry was made for about as many tokens."""
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
    # The first of equals: candidates lie in the order of their folders.
    best = min(fitting, key=lambda one: _rank(one, tokens))
    if best is theirs:
        name = show(f"{best.path.parent.name}/{best.path.name}")
        return EngineEntry(f"its own table {name} stands before any of ours", _take_entry(best, tokens))
    return _take_entry(best, tokens)


def _read_by_engine(tables: FoundTables) -> TableCandidate | None:
    """What the engine's own lookup takes from its folders, for this GPU's name.

    If each Triton has a folder, the running Triton's table or else the newest; otherwise the first that there is.
    """
    own = [one for one in tables.candidates if one.table_dir.is_engines and not (one.is_alias or one.is_misspelt)]
    exact = next((one for one in own if one.is_exact_triton and not one.table_dir.is_flat), None)
    return exact or (own[0] if own else None)


def best_table(tables: FoundTables) -> TableCandidate | None:
    """The table that stands before all others, for any number of tokens; None if that is the engine's own."""
    found = [one for one in tables.candidates if one.up]
    best = min(found, key=lambda one: _rank(one, next(iter(one.up))), default=None)
    return None if best is not None and best is _read_by_engine(tables) and best.known is None else best


def _origin(candidate: TableCandidate, tokens: int) -> str:
    known = candidate.known
    if known is not None and known.broken is not None:
        return "origin unknown, its provenance cannot be read"
    return (known and known.origin(config_table.nearest(candidate.up, tokens))) or "origin unknown"


def _standing(candidate: TableCandidate, tokens: int) -> int:
    """An entry of unknown origin in a table of ours is worth no more than a predicted one.

    In the engine's own folder such an entry is one that the engine shipped, and that ours were merged with.
    """
    known = candidate.known
    if known is None:
        return 0
    origin = known.origin(config_table.nearest(candidate.up, tokens))
    if origin is None:
        is_shipped = candidate.table_dir.is_engines and known.broken is None
        return 0 if is_shipped else _STANDING["predicted"]
    return _STANDING[origin]


def _is_measured(candidate: TableCandidate) -> bool:
    """Whether it has an entry for the running Triton that was measured, or that the engine ships."""
    is_for_any_triton = candidate.table_dir.is_flat and candidate.known is None
    is_here = candidate.is_exact_triton or is_for_any_triton
    return is_here and any(_standing(candidate, tokens) == 0 for tokens in candidate.up)


def _rank(candidate: TableCandidate, tokens: int) -> tuple[int, ...]:
    standing = _standing(candidate, tokens)
    return not candidate.table_dir.is_asked_for, standing, candidate.is_alias, not candidate.is_exact_triton


def _take_entry(candidate: TableCandidate, tokens: int) -> OurEntry:
    """The entries of that table for that many tokens."""
    up_key = config_table.nearest(candidate.up, tokens)
    up, down, down_options = candidate.up[up_key], None, {}
    if candidate.down and covers(candidate.down, tokens):
        down_key = config_table.nearest(candidate.down, tokens)
        # Both GEMMs share one sort of the tokens.
        if candidate.down[down_key].block_m == up.block_m:
            down, down_options = candidate.down[down_key], dict(candidate.down_options.get(down_key, {}))
    most_block_m = max(config.block_m for config in (candidate.down or candidate.up).values())
    triton = "" if candidate.is_exact_triton else f", made with {show(candidate.made_with)}"
    device = f", made for {candidate.device_name}" if candidate.is_alias else ""
    return OurEntry(
        up,
        down,
        most_block_m,
        table_dir=candidate.table_dir.name,
        path=candidate.path,
        entry=up_key,
        origin=f"{_origin(candidate, tokens)}{device}{triton}",
        up_options=candidate.up_options.get(up_key, {}),
        down_options=down_options,
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

    def __init__(
        self,
        engine: RunningEngine,
        table_dirs: Callable[[], Sequence[TableDir]],
        name: Literal["sglang", "vllm"] = "sglang",
    ) -> None:
        self._engine, self._table_dirs, self._name = engine, table_dirs, name
        self._tables: dict[LookupLayer, FoundTables | None] = {}
        self._said: set[tuple[LookupLayer, str]] = set()
        self._advised: set[LookupLayer] = set()

    def select(self, layer: LookupLayer, tokens: int) -> Choice:
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
        shape, device_name, triton = layer.shape, self._engine.device_name(), self._engine.triton
        if shape is None or device_name is None or triton is None:
            return None
        gpu = running_engine.running_gpu(device_name)
        return table_search.search(shape, device_name, gpu, triton, self._table_dirs(), any_layer=any_layer)

    def say(self, layer: LookupLayer, choice: Choice) -> None:
        """One line for each reason of each layer."""
        if (layer, choice.why) not in self._said:
            self._said.add((layer, choice.why))
            log.info("sglang-moe-ext: %s: %s", layer.shape or layer, describe(choice))
        if layer not in self._advised:
            self._advised.add(layer)
            if (advice := self._advise(layer)) is not None:
                log.info("sglang-moe-ext: %s", advice)

    def _advise(self, layer: LookupLayer) -> str | None:
        """How to get a measured table where there is none for this GPU and Triton, and the user asks for none."""
        found = self._tables.get(layer)
        if layer.shape is None or found is None or env.is_on(env.AUTOTUNE) or self._engine.is_deterministic():
            return None
        if any(_is_measured(one) for one in found.candidates):
            return None
        engine = "" if self._name == "sglang" else f"--engine {self._name} "
        return (
            f"no table was measured for this layer here: `sglang-moe-ext tune {engine}--shape '{layer.shape}'` makes "
            f"one on an idle GPU, as does the next start with {env.AUTOTUNE}=1"
        )

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
