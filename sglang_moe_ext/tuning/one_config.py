"""As in search.py, where one configuration serves both GEMMs: what is timed again, and what comes to the rematch."""

from __future__ import annotations

from sglang_moe_ext.core import PROJECTIONS, CompileKey, Projection, TileConfig
from sglang_moe_ext.tuning.questions import Pair
from sglang_moe_ext.tuning.search import Screening, Times

_PER_BINARY = 2
"""Finalists that differ in GROUP_SIZE_M alone."""


def ranked(times: Times) -> list[TileConfig]:
    """The configurations that ran in both GEMMs, the smallest sum of times first."""
    sums = {config: us + times["down"][config] for config, us in times["up"].items() if config in times["down"]}
    return sorted(sums, key=lambda config: (sums[config], config))


def fastest_keys(times: Times, count: int) -> dict[Projection, list[CompileKey]]:
    """The same binaries for each GEMM: so many of those whose configurations are fastest in both together."""
    keys = list(dict.fromkeys(config.compile_key for config in ranked(times)))[:count]
    return dict.fromkeys(PROJECTIONS, keys)


def finalists(screening: Screening, count: int) -> list[Pair]:
    """So many of the fastest, each as the pair of itself, not more than two of one binary."""
    taken: list[TileConfig] = []
    for config in ranked(screening.times):
        if sum(config.compile_key == other.compile_key for other in taken) < _PER_BINARY:
            taken.append(config)
    return [{"up": config, "down": config} for config in taken[:count]]
