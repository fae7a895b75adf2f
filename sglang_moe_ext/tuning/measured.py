"""Measure on one GPU: screen a shortlist, race finalists against the incumbent, let only right ones win."""

from __future__ import annotations

import itertools
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sglang_moe_ext.core import PROJECTIONS, Failure, MoEShape, Projection, TileConfig
from sglang_moe_ext.tuning.worker import Check, Pair, Race, Screen

log = logging.getLogger(__name__)

Ask = Callable[[Screen | Race | Check], object]
"""The GPU's side: microseconds of a Screen, times of a Race, error of a Check; or a Failure. A test passes a table."""

SCREEN_SAMPLES = 3
FINALISTS = 6
ROUNDS = 24
LEAST_GAIN = 0.01
"""The incumbent stays unless it is beaten by more than this, and by more than it differs from itself."""
TOLERATED_ERROR = {None: 1e-2, "fp8_w8a8": 4e-2, "int8_w8a8": 4e-2}
"""Relative error against float32 that a right result stays under: 2e-3 seen for bf16, 6e-3 for fp8 (H200)."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was chosen for one M. Times in microseconds, medians of one race, up and down together."""

    pair: Pair
    us: float
    incumbent_us: float
    noise: float
    error: float
    tried: int
    failed: int

    @property
    def gain(self) -> float:
        """How many times faster than the incumbent."""
        return self.incumbent_us / self.us


def choose(shape: MoEShape, tokens: int, shortlist: Sequence[TileConfig], incumbent: Pair, ask: Ask) -> Measured | None:
    """The fastest right pair for that many tokens, or the incumbent where none beats it by more than the noise.

    None where the incumbent stays but cannot run, or is wrong: nothing is known then that could be written down.
    """
    times, failed = _screened(tokens, shortlist, ask)
    finalists = [pair for pair in _best_pairs(times) if pair != incumbent][:FINALISTS]
    first, *rivals, again = _raced(tokens, [incumbent, *finalists, incumbent], ask)
    incumbent_us = statistics.median([*first, *again])
    noise = abs(_median_ratio(first, again) - 1) if math.isfinite(incumbent_us) else 0.0
    by_time = sorted(zip(finalists, rivals, strict=True), key=lambda entry: statistics.median(entry[1]))
    for pair, samples in by_time:
        if not math.isfinite(statistics.median(samples)):
            break
        if _median_ratio(first, samples) - 1 <= max(LEAST_GAIN, noise):
            break
        error = _error(tokens, pair, ask)
        if error <= TOLERATED_ERROR[shape.quantisation.scheme]:
            return Measured(pair, statistics.median(samples), incumbent_us, noise, error, len(shortlist), failed)
        log.warning("M=%d: %s is fast and WRONG (relative error %.3g): left out", tokens, pair, error)
    error = _error(tokens, incumbent, ask)
    if not math.isfinite(incumbent_us) or error > TOLERATED_ERROR[shape.quantisation.scheme]:
        log.warning("M=%d: left out: nothing that runs there gave a right result (%s)", tokens, incumbent)
        return None
    return Measured(incumbent, incumbent_us, incumbent_us, noise, error, len(shortlist), failed)


def _median_ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """Median over the rounds of one launch's time by another's in the same round."""
    return statistics.median(mine / theirs for mine, theirs in zip(of, to, strict=True))


def _screened(
    tokens: int, shortlist: Iterable[TileConfig], ask: Ask
) -> tuple[dict[Projection, dict[TileConfig, float]], int]:
    """Best time of each candidate in each GEMM, and how many could not run."""
    times: dict[Projection, dict[TileConfig, float]] = {projection: {} for projection in PROJECTIONS}
    failed: set[TileConfig] = set()
    for config, projection in itertools.product(shortlist, PROJECTIONS):
        answer = ask(Screen(tokens, projection, config, SCREEN_SAMPLES))
        if isinstance(answer, Failure):
            failed.add(config)
            log.info("M=%d: %s cannot run the %s GEMM: %s", tokens, config, projection, answer.message)
        elif isinstance(answer, list):
            times[projection][config] = min(answer)
    return times, len(failed)


def _best_pairs(times: dict[Projection, dict[TileConfig, float]]) -> list[Pair]:
    """Pairs of one BLOCK_SIZE_M, fastest sum first; both GEMMs share the sort of the tokens, and so its block size."""
    pairs: list[tuple[float, Pair]] = []
    for block_m in {config.block_m for config in times["up"]}:
        best = {
            projection: sorted((us, config) for config, us in times[projection].items() if config.block_m == block_m)[
                :3
            ]
            for projection in PROJECTIONS
        }
        for (up_us, up), (down_us, down) in itertools.product(best["up"], best["down"]):
            pairs.append((up_us + down_us, {"up": up, "down": down}))
    return [pair for _, pair in sorted(pairs, key=lambda scored: scored[0])]


def _raced(tokens: int, pairs: Sequence[Pair], ask: Ask) -> list[list[float]]:
    """Times of each pair in each round; of a pair that fails there, infinite ones."""
    answer = ask(Race(tokens, tuple(pairs), ROUNDS))
    if isinstance(answer, list):
        return answer
    log.warning("M=%d: the race failed (%s): racing one by one", tokens, answer)
    rows: list[list[float]] = []
    for pair in pairs:
        alone = ask(Race(tokens, (pair,), ROUNDS))
        rows.append(alone[0] if isinstance(alone, list) else [float("inf")] * ROUNDS)
    return rows


def _error(tokens: int, pair: Pair, ask: Ask) -> float:
    answer = ask(Check(tokens, pair))
    return answer if isinstance(answer, float) else float("inf")
