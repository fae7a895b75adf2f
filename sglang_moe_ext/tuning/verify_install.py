"""Prove that the engine takes what was written: a fresh process of it is asked which entry it takes for each M."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sglang_moe_ext.core import EngineError, Table, TileConfig
from sglang_moe_ext.engines.adapter import ProbeLike
from sglang_moe_ext.engines.lookup_probe import LookupRequest, LookupResult
from sglang_moe_ext.tables import config_table
from sglang_moe_ext.tuning.bench.messages import Pair
from sglang_moe_ext.tuning.request import TuneRequest

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


def pairs_of(answer: LookupResult) -> dict[int, Pair]:
    """The configurations of both GEMMs; without a table for the down projection the engine runs the up projection's."""
    return {m: {"up": up, "down": answer.down[m] or replace(up, use_tma=False)} for m, up in answer.up.items()}


def verify(written: WrittenTables, request: TuneRequest, engine: ProbeLike) -> LookupResult:
    """The engine's answer, when it is the one that the tables give.

    Raises:
        EngineError: it takes another entry for some M, or reads other files.
    """
    tokens = sorted({*written.up, *BETWEEN_AND_BEYOND})
    answer = engine.answer(lookup_request(request, tokens))
    title = request.adapter.TITLE
    for file in (written.up_file, written.down_file):
        if file is not None and file.resolve() not in {opened.resolve() for opened in answer.files}:
            read = ", ".join(map(str, answer.files)) or "no table at all"
            raise EngineError(f"{title} {answer.engine_version} did not read {file}, now written: it read {read}")
    for m in tokens:
        up = written.up[config_table.nearest(written.up, m)]
        _compare(m, f"{title} takes {answer.up[m]} for the up projection", answer.up[m], up)
        if written.down is not None:
            down = written.down[config_table.nearest(written.down, m)]
            taken = answer.down[m]
            _compare(m, f"{title} takes {taken} for the down projection", taken, replace(down, block_m=up.block_m))
    return answer


def _compare(tokens: int, said: str, taken: TileConfig | None, expected: TileConfig) -> None:
    if taken != expected:
        raise EngineError(f"{said} at M={tokens}: the written table has {expected}")
