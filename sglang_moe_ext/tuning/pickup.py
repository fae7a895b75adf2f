"""Prove that the engine takes what was written: a fresh process of it is asked which entry it takes for each M."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from sglang_moe_ext.core import EngineError, Gpu, MoEShape, Table, TileConfig
from sglang_moe_ext.engines.sglang import lookup
from sglang_moe_ext.store import tables

BETWEEN_AND_BEYOND = (3, 20, 200, 5000, 100_000)
"""Batch sizes that are no keys: the engine must come to the nearest one."""


@dataclass(frozen=True, slots=True)
class Written:
    """What lies on disk after a run: the up table, the down table, and the folder with their names."""

    up: Table
    down: Table
    up_file: Path
    down_file: Path


def ask(shape: MoEShape, tokens: list[int], gpu: Gpu, is_here: bool, environment: dict[str, str]) -> lookup.Answer:
    """What the engine takes today, under those variables; where the GPU is not here, it is told to believe in it."""
    question = lookup.Question(shape, tokens, None if is_here else gpu)
    return lookup.ask(question, {**os.environ, **environment})


def prove(written: Written, shape: MoEShape, gpu: Gpu, is_here: bool, environment: dict[str, str]) -> lookup.Answer:
    """The engine's answer, when it is the one that the tables give.

    Raises:
        EngineError: it takes another entry for some M, or reads other files.
    """
    tokens = sorted({*written.up, *BETWEEN_AND_BEYOND})
    answer = ask(shape, tokens, gpu, is_here, environment)
    for file in (written.up_file, written.down_file):
        if file.resolve() not in {opened.resolve() for opened in answer.files}:
            read = ", ".join(map(str, answer.files)) or "no table at all"
            raise EngineError(f"SGLang {answer.engine_version} did not read {file}, now written: it read {read}")
    for m in tokens:
        up = written.up[tables.nearest(written.up, m)]
        down = written.down[tables.nearest(written.down, m)]
        _compare(m, "up", answer.up[m], up)
        _compare(m, "down", _without_tma(answer.down[m]), replace(down, block_m=up.block_m, use_tma=False))
    return answer


def _without_tma(config: TileConfig | None) -> TileConfig | None:
    return None if config is None else replace(config, use_tma=False)


def _compare(tokens: int, projection: str, taken: TileConfig | None, expected: TileConfig) -> None:
    if taken != expected:
        raise EngineError(
            f"SGLang takes {taken} for the {projection} projection at M={tokens}: the written table has {expected}"
        )
