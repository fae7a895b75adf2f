"""Questions and results of every kind that hypothesis makes up, and a GPU whose results follow from the request."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from hypothesis import strategies as st

from sglang_moe_ext.core import CompileKey, Failure, Projection, TileConfig
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchGemm,
    BenchKernelPlan,
    BenchLayers,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
    GemmTimes,
    LayerTimes,
    Pair,
)
from tests.tables.generated import paths, plans_for_few_tokens

whole = st.integers(1, 2**31 - 1)
times = st.floats(allow_nan=False)
keys = st.builds(CompileKey, *[whole] * 5, st.booleans())
configs = st.builds(TileConfig, *[whole] * 6, st.booleans())
failures = st.builds(Failure, st.text(max_size=8).filter(lambda kind: kind != "Interrupted"), st.text(max_size=20))


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    up, down = draw(configs), draw(configs)
    return {"up": up, "down": TileConfig(up.block_m, *(getattr(down, name) for name in down.__slots__[1:]))}


@st.composite
def screens(draw: st.DrawFn) -> tuple[BenchRequest, BenchResult]:
    projection: Projection = draw(st.sampled_from(["up", "down"]))
    groups = tuple(draw(st.lists(whole, min_size=1, max_size=4)))
    samples = draw(st.integers(1, 3))
    screen = BenchGemm(draw(whole), projection, draw(keys), groups, samples, draw(st.none() | times))
    return screen, GemmTimes(tuple(tuple(draw(st.lists(times, max_size=samples))) for _ in groups))


counts = st.integers(0, 9)


@st.composite
def races(draw: st.DrawFn) -> tuple[BenchRequest, BenchResult]:
    racers, rounds = (
        draw(st.lists(pairs() | paths | plans_for_few_tokens, min_size=1, max_size=3)),
        draw(st.integers(1, 4)),
    )
    race = BenchLayers(draw(whole), tuple(racers), rounds, *draw(st.tuples(counts, counts, st.booleans())))
    us = tuple(tuple(draw(times) for _ in range(rounds)) for _ in racers)
    return race, LayerTimes(us, draw(whole), draw(st.none() | st.text(max_size=9)), draw(st.none() | whole))


@st.composite
def path_screens(draw: st.DrawFn) -> tuple[BenchRequest, BenchResult]:
    samples = draw(st.integers(1, 3))
    return BenchKernelPlan(draw(whole), draw(paths), samples), GemmTimes((tuple(draw(times) for _ in range(samples)),))


checks = st.tuples(st.builds(CheckAccuracy, whole, pairs() | paths | plans_for_few_tokens), st.builds(Accuracy, times))
answered = screens() | path_screens() | races() | checks
trials = answered | st.tuples(answered.map(lambda trial: trial[0]), failures)
"""A request with a result to it, or with a failure."""


def request(number: int) -> BenchGemm:
    return BenchGemm(number, "up", CompileKey(64, 128, 64, 4, 3), (1, 16), 2)


def answer_of(request: BenchRequest) -> BenchResult:
    """As long fractions as a clock gives, some failures, some infinite; always the same to the same request."""
    dice = random.Random(repr(request))
    match request:
        case _ if dice.random() < 0.1:
            return Failure("OutOfResources", f"shared memory, {dice.random()}")
        case BenchGemm():
            return GemmTimes(tuple(tuple(_us(dice) for _ in range(request.samples)) for _ in request.groups))
        case BenchKernelPlan():
            return GemmTimes((tuple(_us(dice) for _ in range(request.samples)),))
        case BenchLayers():
            return LayerTimes(tuple(tuple(_us(dice) for _ in range(request.rounds)) for _ in request.pairs), 4)
        case CheckAccuracy():
            return Accuracy(dice.random() * 1e-2)


def _us(dice: random.Random) -> float:
    return math.inf if dice.random() < 0.05 else dice.uniform(5, 500)


def halving(measure: Callable[[BenchRequest], BenchResult], tokens: int) -> list[tuple[TileConfig, float]]:
    """A tiny strategy whose every request depends on the results before it: screen, keep half, race, check."""
    left = [CompileKey(64, width, depth, 4, 3) for width in (32, 64, 128, 256) for depth in (32, 64, 128)]
    scored: list[tuple[float, CompileKey]] = []
    for samples in (2, 3, 4):
        scored = []
        for key in left:
            result = measure(BenchGemm(tokens, "up", key, (1, 8), samples, scored[0][0] if scored else None))
            best = min(map(min, result.us)) if isinstance(result, GemmTimes) else math.inf
            scored.append((best, key))
        scored.sort()
        left = [key for _, key in scored[: (len(scored) + 1) // 2]]
    configs = [TileConfig(k.block_m, k.block_n, k.block_k, 8, k.num_warps, k.num_stages) for k in left]
    raced = measure(BenchLayers(tokens, tuple({"up": config, "down": config} for config in configs), 5))
    us = [sum(row) for row in raced.us] if isinstance(raced, LayerTimes) else [us for us, _ in scored[: len(configs)]]
    errors = [measure(CheckAccuracy(tokens, {"up": config, "down": config})) for config in configs]
    right = [isinstance(error, Accuracy) and error.error < 8e-3 for error in errors]
    return [(config, time) for config, time, is_right in zip(configs, us, right, strict=True) if is_right]
