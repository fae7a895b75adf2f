"""Prove that the engine takes what was written: a fresh process of it is asked which entry it takes for each M."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from sglang_moe_ext.core import EngineError, Table, TableError, TileConfig
from sglang_moe_ext.engines.adapter import ProbeLike
from sglang_moe_ext.engines.lookup_probe import LookupRequest, LookupResult
from sglang_moe_ext.tables import config_table
from sglang_moe_ext.tuning import known_tables
from sglang_moe_ext.tuning.request import TuneRequest

_ATTEMPTS = 3
ACTIVE = "active"
"""What an answer says of our hooks where they are in."""
BETWEEN_AND_BEYOND = (3, 20, 200, 5000, 100_000)
"""Batch sizes that are no keys: the engine must come to the nearest one."""


@dataclass(frozen=True, slots=True)
class WrittenTables:
    """What lies on disk after a run: the up table with its file, the down table with its own where there is one."""

    up: Table
    up_file: Path
    down: Table | None = None
    down_file: Path | None = None


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Of a process of the engine: ours, and those variables."""
    return {**os.environ, **variables}


def lookup_request(request: TuneRequest, tokens: Sequence[int] | None = None) -> LookupRequest:
    """What the engine takes for the layer; where the GPU is not here, it is told to believe in it."""
    return LookupRequest(request.shape, tokens or request.tokens, None if request.gpu_is_here else request.gpu)


def todays_request(request: TuneRequest) -> LookupRequest:
    """The same, and by which backend a server that chooses it itself runs the layer."""
    return replace(lookup_request(request), backend_flag="auto", architecture=request.architecture)


def verify(
    written: WrittenTables, read: Callable[[], WrittenTables], stored: Path, request: TuneRequest, engine: ProbeLike
) -> LookupResult:
    """The engine's answer, when it is the one that the tables give.

    `read`: what lies on disk. Where another run wrote there meanwhile, the engine is asked again, and the tables of
    both count. `stored`: the copy in the user's own store, which our plugin reads.

    Raises:
        EngineError: it takes another entry for some M, or reads other files.
    """
    for _ in range(_ATTEMPTS):
        answer = engine.answer(lookup_request(request, sorted({*written.up, *BETWEEN_AND_BEYOND})))
        try:
            _check(written, stored, request, answer)
        except EngineError:
            with suppress(TableError):
                if (now := read()) != written:
                    written = now
                    continue
            raise
        return answer
    raise EngineError(f"{written.up_file} changed each time while {request.adapter.TITLE} was asked: run this again")


def _check(written: WrittenTables, stored: Path, request: TuneRequest, answer: LookupResult) -> None:
    if is_served(answer):
        _check_served(written, stored, request, answer)
    else:
        _check_alone(written, request, answer)


def is_served(answer: LookupResult) -> bool:
    """Whether the engine was asked with our hooks active, as a server of this environment has them."""
    return answer.plugin == ACTIVE


def _check_served(written: WrittenTables, stored: Path, request: TuneRequest, answer: LookupResult) -> None:
    """With our hooks, a measured table of the layer stands before a predicted one, which is as it should be.

    Entries of other runs may differ between the store and the folder, and far from an entry our plugin leaves the
    engine's default, so that the entries of this run alone are compared.
    """
    ours = {file.resolve() for file in (written.up_file, stored)}
    if not ours & {file.resolve() for file in answer.files}:
        if request.measuring is None and known_tables.find_measured(request.problem) is not None:
            return
        _raise_unread(written.up_file, request, answer)
    for m in sorted(written.up.keys() & set(request.tokens)):
        _check_entry(m, written, request, answer)


def _check_alone(written: WrittenTables, request: TuneRequest, answer: LookupResult) -> None:
    for file in (written.up_file, written.down_file):
        if file is not None and file.resolve() not in {opened.resolve() for opened in answer.files}:
            _raise_unread(file, request, answer)
    for m in sorted({*written.up, *BETWEEN_AND_BEYOND}):
        _check_entry(m, written, request, answer)


def _raise_unread(file: Path, request: TuneRequest, answer: LookupResult) -> NoReturn:
    read = ", ".join(map(str, answer.files)) or "no table at all"
    raise EngineError(
        f"{request.adapter.TITLE} {answer.engine_version} did not read {file}, now written: it read {read}"
    )


def _check_entry(tokens: int, written: WrittenTables, request: TuneRequest, answer: LookupResult) -> None:
    title = request.adapter.TITLE
    up = written.up[config_table.nearest(written.up, tokens)]
    _compare(tokens, f"{title} takes {answer.up[tokens]} for the up projection", answer.up[tokens], up)
    if written.down is not None:
        down, taken = written.down[config_table.nearest(written.down, tokens)], answer.down[tokens]
        _compare(tokens, f"{title} takes {taken} for the down projection", taken, replace(down, block_m=up.block_m))


def _compare(tokens: int, said: str, taken: TileConfig | None, expected: TileConfig) -> None:
    if taken != expected:
        raise EngineError(f"{said} at M={tokens}: the written table has {expected}")
