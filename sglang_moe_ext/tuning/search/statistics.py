"""What interleaved samples say: how many times faster one is than another, how sure that is, how long one takes."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_RESAMPLES = 1000
_TAIL = 25
"""Resamples beyond each bound: 2.5 %, so that 95 % lie between."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate, and the bounds between which the truth lies with 95 % confidence."""

    value: float
    low: float
    high: float


def gain(of: Sequence[float], to: Sequence[float], routings: int) -> Interval:
    """How many times faster `to` is than `of`, which both took part in every round; round r took routing r % routings.

    The mean over the routings of the median log ratio, so that no routing counts for more than another and no wild
    sample for more than one. Bounds by bootstrap: each routing's rounds are drawn anew from the deviations of all.

    Raises:
        ValueError: a time is not positive, the two differ in length, or there is no round at all.
    """
    logs = [math.log(slow) - math.log(quick) for slow, quick in zip(of, to, strict=True)]
    # One round says nothing of its routing's spread, so all rounds count as of one routing where some have no second.
    by_routing = _by_routing(logs, routings if len(logs) >= 2 * routings else 1)
    medians = [statistics.median(group) for group in by_routing]
    value = statistics.fmean(medians)
    errors = _resampled_errors(by_routing, medians)
    low, high = min(errors[_TAIL], 0.0), max(errors[-1 - _TAIL], 0.0)
    return Interval(math.exp(value), math.exp(value + low), math.exp(value + high))


def typical_us(samples: Sequence[float], routings: int) -> float:
    """The mean over the routings of the median; sample r took routing r % routings."""
    return statistics.fmean(statistics.median(group) for group in _by_routing(samples, routings))


def _by_routing(samples: Sequence[float], routings: int) -> list[Sequence[float]]:
    return [samples[routing::routings] for routing in range(min(routings, len(samples)))]


def _resampled_errors(by_routing: Sequence[Sequence[float]], medians: Sequence[float]) -> list[float]:
    """Means of the medians of resampled deviations, ascending.

    Deviations are pooled: drawn within a routing of 8 rounds, the bounds held the truth in 99 of 100 simulations, and
    were 2.6 times as wide where 3 % of the samples were wild; pooled, in 93 to 96 (32 rounds of 1 to 16 routings).
    """
    deviations = [
        (sample - median) * math.sqrt(len(group) / max(len(group) - 1, 1))  # a group lies too near its own median
        for group, median in zip(by_routing, medians, strict=True)
        for sample in group
    ]
    draw = random.Random(0)
    sums = [0.0] * _RESAMPLES
    for group in by_routing:
        rounds = len(group)
        drawn = draw.choices(deviations, k=rounds * _RESAMPLES)
        for index in range(_RESAMPLES):
            ordered = sorted(drawn[index * rounds : (index + 1) * rounds])
            sums[index] += (ordered[(rounds - 1) // 2] + ordered[rounds // 2]) / 2
    return sorted(total / len(by_routing) for total in sums)
