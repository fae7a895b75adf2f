"""Which configuration a layer runs at each number of tokens: of the user's tables, the shipped ones, the engine's own.

Pure but for reading tables: who calls it knows the layer, the GPU and where tables lie.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext import gpus
from sglang_moe_ext.core import Gpu, MoEShape, Table, TableError, TileConfig
from sglang_moe_ext.engines.sglang import naming
from sglang_moe_ext.store import provenance, tables
from sglang_moe_ext.store.provenance import Provenance

log = logging.getLogger(__name__)

SATURATED_TOKENS = 4096
"""From here on every expert has whole tiles of rows, and more tokens mean more of the same tiles."""
_FARTHEST = 2.0
"""A table covers the numbers of tokens within this ratio of one that it was made for."""


@dataclass(frozen=True, slots=True)
class Place:
    """Folders `triton_X_Y_Z` of tables under one root.

    `is_engines`: what the engine itself reads; `is_asked_for`: the user named it to the engine, so it comes first.
    """

    name: str
    root: Path
    is_engines: bool = False
    is_asked_for: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """A table that could serve a layer, with the table for its down projection alone, if there is one.

    `known` None: nobody knows where it comes from, so it is the engine's own, or was put there by hand. `up` is empty
    where all of it was made for another layer.
    """

    place: Place
    path: Path
    device_name: str
    is_alias: bool
    is_exact_triton: bool
    up: Table
    known: Provenance | None
    down: Table | None


@dataclass(frozen=True, slots=True)
class Ours:
    """A configuration of one of our tables; no `down`: both GEMMs run `up`.

    `entry` is the M that it was made for, `origin` what is known of it: measured or predicted, and for what else.
    """

    up: TileConfig
    down: TileConfig | None
    most_block_m: int
    place: str
    path: Path
    entry: int
    origin: str

    @property
    def why(self) -> str:
        """The same for all entries of one table: a log says it once."""
        return f"{self.place} table {self.path} ({self.origin})"


@dataclass(frozen=True, slots=True)
class Engines:
    """The engine's own lookup knows no worse."""

    why: str


@dataclass(frozen=True, slots=True)
class Default:
    """The engine's lookup would take a far neighbour out of a table of ours; its default is the better guess."""

    why: str


Choice = Ours | Engines | Default


@dataclass(frozen=True, slots=True)
class Shelf:
    """All the tables for one layer on one GPU, best place first, whatever the number of tokens."""

    candidates: tuple[Candidate, ...]


def gathered(shape: MoEShape, device_name: str, gpu: Gpu | None, triton: str, places: Sequence[Place]) -> Shelf:
    """Read what lies at the places for that layer. What cannot be read as a table is passed over, with one line."""
    others = [] if gpu is None or gpu.device_name != device_name else gpus.aliases(gpu)
    names = [device_name, *(name for name in others if name != device_name)]
    found = [
        candidate
        for place in places
        for name in names
        for folder in _folders(place.root)
        if (candidate := _candidate(place, folder, shape, name, name != device_name, triton)) is not None
    ]
    return Shelf(tuple(found))


def _folders(root: Path) -> list[Path]:
    """Newest Triton first, as the engine searches them."""
    try:
        folders = [folder for folder in root.iterdir() if naming.is_version_folder(folder.name)]
    except OSError:
        return []  # a place that is missing or closed has no tables
    return sorted(folders, key=lambda folder: [int(part) for part in folder.name.split("_")[1:]], reverse=True)


def _candidate(
    place: Place, folder: Path, shape: MoEShape, device_name: str, is_alias: bool, triton: str
) -> Candidate | None:
    path = folder / naming.file_name(naming.table_key(shape, device_name))
    try:
        if not path.exists():
            return None
        known = provenance.read(path)
        down_path = path.with_name(f"{path.stem}_down.json")
        up = _of_layer(tables.read(path), known, shape)
        down = _of_layer(tables.read(down_path), provenance.read(down_path), shape) if down_path.exists() else None
    except (TableError, OSError) as error:
        log.warning("sglang-moe-ext passes over a table: %s", error)
        return None
    is_exact = folder.name == naming.version_folder(triton)
    return Candidate(place, path, device_name, is_alias, is_exact, up, known, down)


def _of_layer(table: Table, known: Provenance | None, shape: MoEShape) -> Table:
    """Its entries that were made for this hidden size and top-k: the file's name tells neither."""
    entries = {} if known is None else known.entries
    return {m: config for m, config in table.items() if m not in entries or _is_of(entries[m].run.shape, shape)}


def _is_of(made_for: object, shape: MoEShape) -> bool:
    """`made_for` is a shape as text, or whatever else a file has there. No parser: one of few experts is no --shape."""
    return f",K={shape.hidden_size},topk={shape.top_k}," in str(made_for)


def covers(table: Table, tokens: int) -> bool:
    """Whether the entry that is nearest was made for about as many tokens."""
    key = tables.nearest(table, tokens)
    if tokens > key:
        return tokens <= _FARTHEST * key or key >= SATURATED_TOKENS
    return key <= _FARTHEST * tokens


def chosen(shelf: Shelf, tokens: int) -> Choice:
    """What was asked for, then measured before predicted, this GPU and this Triton before others, then by place."""
    read = _read_by_engine(shelf)
    theirs = read if read is not None and read.known is None else None
    fitting = [one for one in shelf.candidates if one.up and (one is theirs or covers(one.up, tokens))]
    if not fitting:
        # Not the number: this is logged once for all of them.
        why = "no table is for this many tokens" if any(one.up for one in shelf.candidates) else "there is no table"
        return Engines(why) if read is None else Default(why)
    # The first of equals: candidates lie in the order of places.
    best = min(fitting, key=lambda one: _rank(one, tokens))
    if best is theirs:
        return Engines(f"its own table {best.path.parent.name}/{best.path.name} stands before any of ours")
    return _of(best, tokens)


def _read_by_engine(shelf: Shelf) -> Candidate | None:
    """What the engine's own lookup takes: of its place and this GPU's name, its Triton's table or else the newest."""
    own = [one for one in shelf.candidates if one.place.is_engines and not one.is_alias]
    return next((one for one in own if one.is_exact_triton), own[0] if own else None)


def _origin(candidate: Candidate, tokens: int) -> str:
    return (candidate.known and candidate.known.origin(tables.nearest(candidate.up, tokens))) or "origin unknown"


def _rank(candidate: Candidate, tokens: int) -> tuple[bool, ...]:
    is_predicted = _origin(candidate, tokens) == "predicted"
    return not candidate.place.is_asked_for, is_predicted, candidate.is_alias, not candidate.is_exact_triton


def _of(candidate: Candidate, tokens: int) -> Ours:
    up = candidate.up[tables.nearest(candidate.up, tokens)]
    down = None
    if candidate.down and covers(candidate.down, tokens):
        nearest = candidate.down[tables.nearest(candidate.down, tokens)]
        # Both GEMMs share one sort of the tokens.
        down = nearest if nearest.block_m == up.block_m else None
    most_block_m = max(config.block_m for config in (candidate.down or candidate.up).values())
    triton = "" if candidate.is_exact_triton else f", made with {candidate.path.parent.name}"
    device = f", made for {candidate.device_name}" if candidate.is_alias else ""
    return Ours(
        up,
        down,
        most_block_m,
        place=candidate.place.name,
        path=candidate.path,
        entry=tables.nearest(candidate.up, tokens),
        origin=f"{_origin(candidate, tokens)}{device}{triton}",
    )
