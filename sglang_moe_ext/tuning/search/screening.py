"""Which candidates are timed at one M, and which reach the final comparison: functions over `measure`, no GPU."""

from __future__ import annotations

import itertools
import logging
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sglang_moe_ext.core import PROJECTIONS, CompileKey, Failure, Projection, TileConfig
from sglang_moe_ext.tuning.bench.messages import BenchGemm, GemmTimes, Measure, Pair

log = logging.getLogger(__name__)

EffortName = Literal["quick", "full", "exhaustive"]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is timed at each M.

    `keys`: the binaries of each GEMM that come first by the wave model, None for all; `grouped`: how many of the
    fastest with TMA, and without it, are timed with every GROUP_SIZE_M; `finalists`: pairs of each of the two in
    the final comparison, of `rounds` rounds.
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
"""Times the best one so far of the same kind, with TMA or without: a first sample above that is the last one."""
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


def fastest_keys(times: Times, count: int) -> dict[Projection, list[CompileKey]]:
    """The binaries of the fastest configurations of each GEMM, so many with TMA and so many without."""
    found: dict[Projection, list[CompileKey]] = {}
    for projection, of_gemm in times.items():
        ranked = sorted(of_gemm, key=of_gemm.__getitem__)
        by_tma = [[config for config in ranked if config.use_tma == use_tma][:count] for use_tma in (False, True)]
        found[projection] = [config.compile_key for configs in by_tma for config in configs]
    return found


def screen(
    tokens: int,
    candidates: Mapping[Projection, Sequence[TileConfig]],
    effort: Effort,
    measure: Measure,
    clean: Clean,
    is_over: Callable[[], bool] = lambda: False,
    fastest: Callable[[Times, int], Mapping[Projection, Iterable[CompileKey]]] = fastest_keys,
) -> Screening:
    """Time each candidate of each GEMM, and the `fastest` with every GROUP_SIZE_M that the candidates have.

    Candidates come best guess first, and the GEMMs take turns; `is_over` ends the screening early, but not before
    something was timed of each.
    """
    gemms = {projection: _Gemm(tokens, projection, measure) for projection in PROJECTIONS}
    groups = {projection: groups_by_key(configs) for projection, configs in candidates.items()}
    failures: Counter[str] = Counter()
    tried = 0

    def note(trouble: Failure | None, projection: Projection, key: CompileKey) -> None:
        if trouble is not None:
            failures[trouble.kind] += 1
            log.info("M=%d: %s cannot run the %s GEMM: %s", tokens, key, projection, trouble.message)

    for projection, key in _in_turn(groups):
        gemm = gemms[projection]
        if is_over() and gemm.times:
            continue
        tried += 1
        note(clean(projection, key) or gemm.timed(key, groups[projection][key][:1], _SAMPLES), projection, key)
    again = fastest({projection: gemm.times for projection, gemm in gemms.items()}, effort.grouped)
    for projection, gemm in gemms.items():
        for key in again[projection]:
            if is_over():
                break
            note(gemm.timed(key, groups[projection][key], _GROUPED_SAMPLES), projection, key)
    return Screening({projection: gemm.times for projection, gemm in gemms.items()}, tried, dict(failures))


class _Gemm:
    """What is known of one GEMM at one M."""

    def __init__(self, tokens: int, projection: Projection, measure: Measure) -> None:
        self.times: dict[TileConfig, float] = {}
        self._tokens, self._projection, self._measure = tokens, projection, measure
        self._first_us: dict[bool, float] = {}
        """The fastest first sample with TMA, and without. First samples share a routing, so they compare with
        each other alone; of one kind, since what TMA saves a GEMM, the layer may pay for before and after it."""

    def timed(self, key: CompileKey, groups: tuple[int, ...], samples: int) -> Failure | None:
        """Time that binary with those groups; why it cannot be. A configuration timed before keeps the later time."""
        best_us = self._first_us.get(key.use_tma)
        limit_us = None if best_us is None else _HOPELESS * best_us
        result = self._measure(BenchGemm(self._tokens, self._projection, key, groups, samples, limit_us))
        if isinstance(result, Failure):
            return result
        if not isinstance(result, GemmTimes):
            raise TypeError(f"BenchGemm returned {result}")
        for group, us in zip(groups, result.us, strict=True):
            if us:
                self.times[key.with_group(group)] = statistics.median(us)
                self._first_us[key.use_tma] = min(us[0], self._first_us.get(key.use_tma, us[0]))
        return None


def _in_turn(groups: Mapping[Projection, Iterable[CompileKey]]) -> list[tuple[Projection, CompileKey]]:
    """The first binary of each GEMM, the second of each, and so on."""
    by_gemm = [[(projection, key) for key in keys] for projection, keys in groups.items()]
    return [one for of_place in itertools.zip_longest(*by_gemm) for one in of_place if one is not None]


def groups_by_key(configs: Iterable[TileConfig]) -> dict[CompileKey, tuple[int, ...]]:
    """Each binary once, in the order of the candidates, with its groups, best guess first."""
    groups: dict[CompileKey, list[int]] = {}
    for config in configs:
        groups.setdefault(config.compile_key, []).append(config.group_m)
    return {key: tuple(of_key) for key, of_key in groups.items()}


def finalists(screening: Screening, count: int) -> list[Pair]:
    """The fastest pairs whose down GEMM goes without TMA, and those with it, so many each, best sum first.

    Both GEMMs share the sort of the tokens, and so one BLOCK_SIZE_M. Sums of one kind say nothing of the other: a GEMM
    with TMA is faster alone, but has the activation and the quantization work on the rows that pad the blocks as well.
    """
    ranked = _pairs(screening.times)
    found: list[Pair] = []
    for use_tma in (False, True):
        of_kind = [pair for pair in ranked if pair["down"].use_tma == use_tma]
        best = of_kind[:count]
        # Were a binary of the first one wrong, or broken in the layer, all that share it would be.
        unlike = next((pair for pair in of_kind if not _share_a_binary(pair, of_kind[0])), None)
        if count > 1 and unlike is not None and unlike not in best:
            best[-1] = unlike
        found += best
    return found


def _share_a_binary(one: Pair, other: Pair) -> bool:
    return any(one[projection].compile_key == other[projection].compile_key for projection in PROJECTIONS)


def _pairs(times: Times) -> list[Pair]:
    """The fastest of each BLOCK_SIZE_M with each other, best sum first."""
    pairs: list[tuple[float, Pair]] = []
    for block_m in sorted({config.block_m for config in times["up"]}):
        best = {projection: _fastest(times[projection], block_m) for projection in PROJECTIONS}
        for (up_us, up), (down_us, down) in itertools.product(best["up"], best["down"]):
            pairs.append((up_us + down_us, {"up": up, "down": down}))
    return [pair for _, pair in sorted(pairs, key=lambda scored: (scored[0], scored[1]["up"], scored[1]["down"]))]


def _fastest(times: dict[TileConfig, float], block_m: int) -> list[tuple[float, TileConfig]]:
    """Of one BLOCK_SIZE_M, the fastest without TMA and with it; of configurations of one binary, only two."""
    ranked = sorted((us, config) for config, us in times.items() if config.block_m == block_m)
    taken: list[tuple[float, TileConfig]] = []
    for us, config in ranked:
        same_binary = sum(config.compile_key == other.compile_key for _, other in taken)
        same_tma = sum(config.use_tma == other.use_tma for _, other in taken)
        if same_binary < 2 and same_tma < _PER_BLOCK_M:
            taken.append((us, config))
    return taken


_PER_BINARY = 2
"""Finalists that differ in GROUP_SIZE_M alone."""


def rank_shared(times: Times) -> list[TileConfig]:
    """The configurations that ran in both GEMMs, the smallest sum of times first."""
    sums = {config: us + times["down"][config] for config, us in times["up"].items() if config in times["down"]}
    return sorted(sums, key=lambda config: (sums[config], config))


def fastest_shared_keys(times: Times, count: int) -> dict[Projection, list[CompileKey]]:
    """The same binaries for each GEMM: so many of those whose configurations are fastest in both together."""
    keys = list(dict.fromkeys(config.compile_key for config in rank_shared(times)))[:count]
    return dict.fromkeys(PROJECTIONS, keys)


def shared_finalists(screening: Screening, count: int) -> list[Pair]:
    """So many of the fastest, each as the pair of itself, not more than two of one binary."""
    taken: list[TileConfig] = []
    for config in rank_shared(screening.times):
        if sum(config.compile_key == other.compile_key for other in taken) < _PER_BINARY:
            taken.append(config)
    return [{"up": config, "down": config} for config in taken[:count]]


KEPT_FOR_COMPARISONS = 0.25
"""Share of the budget. No choice is made without a final comparison, so the screening ends before the budget does.

A final comparison is not cut short: a budget too small for one of each batch size is overrun."""


class Budget:
    """`seconds` from now on, None for no limit, of which `kept` is no screening's. `executors` work together."""

    def __init__(
        self,
        seconds: float | None,
        shares: int,
        executors: int = 1,
        clock: Callable[[], float] = time.monotonic,
        *,
        kept: float = KEPT_FOR_COMPARISONS,
    ):
        self._clock, self._executors, self._shares = clock, executors, shares
        self._end = None if seconds is None else clock() + seconds * (1 - kept)
        self._taking = threading.Lock()

    def is_spent(self) -> bool:
        """True once nothing is left for screening, and what is kept for the final comparison runs."""
        return self._end is not None and self._clock() >= self._end

    def share(self) -> Callable[[], bool]:
        """Begin one of the shares: what comes back says whether it is used up."""
        with self._taking:
            now, end, shares = self._clock(), self._end, max(self._shares, 1)
            self._shares -= 1
        if end is None:
            return lambda: False
        until = now + max(end - now, 0.0) * min(1.0, self._executors / shares)
        return lambda: self._clock() >= until
