"""Which candidates are timed at one M, and which of them come to the rematch: functions over `ask`, without a GPU."""

from __future__ import annotations

import itertools
import logging
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sglang_moe_ext.core import PROJECTIONS, CompileKey, Failure, Projection, TileConfig
from sglang_moe_ext.tuning.questions import Ask, Pair, Screen, Screened

log = logging.getLogger(__name__)

EffortName = Literal["quick", "full", "exhaustive"]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is timed at each M.

    `keys`: the binaries of each GEMM that come first by the wave model, None for all; `grouped`: how many of the
    fastest of each path, with TMA and without, are timed with every GROUP_SIZE_M; `finalists`: pairs of each path in
    the rematch, of `rounds` rounds.
    """

    keys: int | None
    grouped: int
    finalists: int
    rounds: int


EFFORTS: dict[EffortName, Effort] = {
    "quick": Effort(keys=24, grouped=4, finalists=2, rounds=16),
    "full": Effort(keys=96, grouped=12, finalists=4, rounds=24),
    "exhaustive": Effort(keys=None, grouped=96, finalists=6, rounds=32),
}

_HOPELESS = 1.5
"""Times the best one so far of the same path: a first sample above that is the last one."""
_SAMPLES = 2
_GROUPED_SAMPLES = 4
_PER_BLOCK_M = 3
"""Of each GEMM, the fastest so many configurations of one BLOCK_SIZE_M are paired with each other."""

Times = dict[Projection, dict[TileConfig, float]]
"""Microseconds of the configurations that ran, by GEMM."""
Clean = Callable[[Projection, CompileKey], Failure | None]
"""What is known against a binary before it runs; waits for its compilation. A test says None."""


@dataclass(frozen=True, slots=True)
class Screening:
    """What is left of one M's candidates: times, how many were tried, and how often which failure was met."""

    times: Times
    tried: int
    failures: dict[str, int]


def screened(
    tokens: int,
    candidates: Mapping[Projection, Sequence[TileConfig]],
    effort: Effort,
    ask: Ask,
    clean: Clean,
    is_over: Callable[[], bool] = lambda: False,
) -> Screening:
    """Time each candidate of each GEMM, and the fastest with every GROUP_SIZE_M that the candidates have.

    Candidates come best guess first; `is_over` ends the screening early, but not before something was timed.
    """
    times: Times = {projection: {} for projection in PROJECTIONS}
    failures: Counter[str] = Counter()
    tried = 0
    for projection, configs in candidates.items():
        of_gemm, groups = times[projection], _groups_by_key(configs)
        for key, of_key in groups.items():
            if is_over() and of_gemm:
                break
            tried += 1
            trouble = clean(projection, key)
            if trouble is None:
                limit_us = _limit_us(of_gemm, key.use_tma)
                answer = ask(Screen(tokens, projection, key, of_key[:1], _SAMPLES, limit_us))
                trouble = _noted(of_gemm, key, of_key[:1], answer)
            if trouble is not None:
                failures[trouble.kind] += 1
                log.info("M=%d: %s cannot run the %s GEMM: %s", tokens, key, projection, trouble.message)
        for key in _fastest_keys(of_gemm, effort.grouped):
            if is_over():
                break
            screen = Screen(tokens, projection, key, groups[key], _GROUPED_SAMPLES, _limit_us(of_gemm, key.use_tma))
            _noted(of_gemm, key, groups[key], ask(screen))
    return Screening(times, tried, dict(failures))


def _groups_by_key(configs: Iterable[TileConfig]) -> dict[CompileKey, tuple[int, ...]]:
    """Each binary once, in the order of the candidates, with its groups, best guess first."""
    groups: dict[CompileKey, tuple[int, ...]] = {}
    for config in configs:
        groups[config.compile_key] = (*groups.get(config.compile_key, ()), config.group_m)
    return groups


def _limit_us(times: Mapping[TileConfig, float], use_tma: bool) -> float | None:
    """Of one path: what TMA saves a GEMM, the layer may pay for before and after it."""
    of_path = [us for config, us in times.items() if config.use_tma == use_tma]
    return _HOPELESS * min(of_path) if of_path else None


def _fastest_keys(times: Mapping[TileConfig, float], count: int) -> list[CompileKey]:
    """The binaries of the fastest configurations, so many of each path."""
    ranked = sorted(times, key=times.__getitem__)
    return [
        config.compile_key
        for use_tma in (False, True)
        for config in [config for config in ranked if config.use_tma == use_tma][:count]
    ]


def _noted(times: dict[TileConfig, float], key: CompileKey, groups: Sequence[int], answer: object) -> Failure | None:
    """Take the times of an answer in; a configuration that was timed before keeps the later time."""
    if isinstance(answer, Failure):
        return answer
    if isinstance(answer, Screened):
        for group, samples in zip(groups, answer.us, strict=True):
            if samples:
                times[key.with_group(group)] = statistics.median(samples)
    return None


def finalists(screening: Screening, count: int) -> list[Pair]:
    """The fastest pairs whose down GEMM goes without TMA, and those with it, so many each, best sum first.

    Both GEMMs share the sort of the tokens, and so one BLOCK_SIZE_M. Sums of one path say nothing of the other: a GEMM
    with TMA is faster alone, but has the activation and the quantisation work on the rows that pad the blocks as well.
    """
    ranked = _pairs(screening.times)
    return [
        pair
        for use_tma in (False, True)
        for pair in [pair for _, pair in ranked if pair["down"].use_tma == use_tma][:count]
    ]


def _pairs(times: Times) -> list[tuple[float, Pair]]:
    pairs: list[tuple[float, Pair]] = []
    for block_m in sorted({config.block_m for config in times["up"]}):
        best = {projection: _fastest(times[projection], block_m) for projection in PROJECTIONS}
        for (up_us, up), (down_us, down) in itertools.product(best["up"], best["down"]):
            pairs.append((up_us + down_us, {"up": up, "down": down}))
    return sorted(pairs, key=lambda scored: (scored[0], scored[1]["up"], scored[1]["down"]))


def _fastest(times: dict[TileConfig, float], block_m: int) -> list[tuple[float, TileConfig]]:
    """Of one BLOCK_SIZE_M, the fastest without TMA and with it; of configurations of one binary, only two."""
    ranked = sorted((us, config) for config, us in times.items() if config.block_m == block_m)
    taken: list[tuple[float, TileConfig]] = []
    for us, config in ranked:
        same_binary = sum(config.compile_key == other.compile_key for _, other in taken)
        same_path = sum(config.use_tma == other.use_tma for _, other in taken)
        if same_binary < 2 and same_path < _PER_BLOCK_M:
            taken.append((us, config))
    return taken
