"""How many times faster, how sure, and how long: of exact times, noisy ones, and times with wild samples among them."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_moe_ext.tuning.search.statistics import gain, typical_us
from tests.examples import examples

SIMULATIONS = 200
LEAST_COVERED, MOST_COVERED = 0.90, 0.99
"""Of 95 %: three standard deviations of a count of 200 are 4.6 %."""

times = st.floats(0.5, 1e5)
factors = st.floats(0.1, 10)
routing_counts = st.integers(1, 9)
rounds_of_two = st.lists(st.tuples(times, times), min_size=1, max_size=32)


def noisy(base: list[float], rounds: int, draw: random.Random, spread: float = 0.01) -> list[float]:
    """Times of so many rounds, each of the routing whose turn it is."""
    return [base[turn % len(base)] * draw.lognormvariate(0, spread) for turn in range(rounds)]


@settings(max_examples=examples(50))
@given(st.lists(times, min_size=1, max_size=32), factors, routing_counts)
def test_a_constant_ratio_is_found_exactly(of: list[float], ratio: float, routings: int) -> None:
    found = gain(of, [us / ratio for us in of], routings)
    assert (found.low, found.value, found.high) == pytest.approx((ratio, ratio, ratio), rel=1e-9)


@settings(max_examples=examples(50))
@given(rounds_of_two, factors, routing_counts)
def test_the_unit_of_time_changes_no_gain(rounds: list[tuple[float, float]], unit: float, routings: int) -> None:
    of, to = (list(column) for column in zip(*rounds, strict=True))
    found, scaled = gain(of, to, routings), gain([us * unit for us in of], [us * unit for us in to], routings)
    assert (scaled.low, scaled.value, scaled.high) == pytest.approx((found.low, found.value, found.high), rel=1e-6)


@settings(max_examples=examples(50))
@given(rounds_of_two, routing_counts)
def test_the_other_way_round_the_gain_is_the_inverse(rounds: list[tuple[float, float]], routings: int) -> None:
    of, to = zip(*rounds, strict=True)
    assert gain(to, of, routings).value == pytest.approx(1 / gain(of, to, routings).value)


@settings(max_examples=examples(50))
@given(rounds_of_two, routing_counts)
def test_the_interval_contains_the_gain(rounds: list[tuple[float, float]], routings: int) -> None:
    found = gain(*zip(*rounds, strict=True), routings)
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize("routings", [1, 4, 8])
@pytest.mark.parametrize("turn", [0, 13, 31])
def test_one_wild_round_of_32_changes_the_gain_by_less_than_one_percent(turn: int, routings: int) -> None:
    draw = random.Random(turn)
    of, to = noisy([10.0] * routings, 32, draw), noisy([8.0] * routings, 32, draw)
    wild = [us * (3 if place == turn else 1) for place, us in enumerate(to)]
    assert gain(of, wild, routings).value == pytest.approx(gain(of, to, routings).value, rel=0.01)


def test_wild_rounds_leave_the_interval_narrow() -> None:
    draw = random.Random(7)
    of, to = noisy([10.0] * 4, 32, draw), noisy([8.0] * 4, 32, draw)
    found = gain(of, [us * (3 if turn in (5, 22) else 1) for turn, us in enumerate(to)], 4)
    assert found.high / found.low < 1.02


@pytest.mark.parametrize("routings", [1, 4, 16])
def test_the_interval_covers_the_truth_in_about_95_of_100_simulations(routings: int) -> None:
    draw = random.Random(20261121)
    covered = 0
    for _ in range(SIMULATIONS):
        base = [draw.uniform(50, 150) for _ in range(routings)]
        found = gain(noisy(base, 32, draw), noisy([us / 1.25 for us in base], 32, draw), routings)
        covered += found.low <= 1.25 <= found.high
    assert LEAST_COVERED <= covered / SIMULATIONS <= MOST_COVERED


def test_a_slowdown_that_meets_both_changes_no_gain() -> None:
    of = [10.0 * (1 + turn / 10) for turn in range(16)]
    assert gain(of, [us / 1.5 for us in of], 4).value == pytest.approx(1.5)


def test_each_routing_counts_the_same() -> None:
    assert gain([10, 10, 10, 10, 10], [5, 20, 5, 20, 5], 2).value == pytest.approx(1)


def test_a_single_round_of_each_routing_is_not_taken_for_certainty() -> None:
    found = gain([10, 10, 10, 10], [5, 8, 9, 12], 4)
    assert found.low < 0.9 < 1.9 < found.high


def test_the_same_times_give_the_same_interval() -> None:
    of, to = noisy([10.0], 32, random.Random(1)), noisy([9.0], 32, random.Random(2))
    assert gain(of, to, 4) == gain(of, to, 4)


def test_32_rounds_take_less_than_20_ms() -> None:
    of, to = noisy([10.0] * 4, 32, random.Random(1)), noisy([9.0] * 4, 32, random.Random(2))

    def seconds() -> float:
        started = time.process_time()
        gain(of, to, 4)
        return time.process_time() - started

    assert min(seconds() for _ in range(5)) < 0.02


@pytest.mark.parametrize(
    ("of", "to"), [([1.0], [0.0]), ([-1.0], [1.0]), ([1.0, 2.0], [1.0]), ([], [])], ids=["0", "negative", "odd", "none"]
)
def test_what_is_no_time_is_refused(of: list[float], to: list[float]) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        gain(of, to, 4)


def test_the_typical_time_is_the_mean_over_the_routings_of_the_median() -> None:
    assert typical_us([10, 100, 12, 102, 999, 104], 2) == (12 + 102) / 2


def test_routings_that_had_no_turn_do_not_count() -> None:
    assert typical_us([10, 20], 4) == 15
