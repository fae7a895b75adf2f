"""The seconds of a search, dealt out to its batch sizes: by a clock that tests turn."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext.tuning.search.screening import KEPT_FOR_COMPARISONS, Budget

seconds = st.floats(0.1, 1e5)
counts = st.integers(1, 40)


@dataclass
class Clock:
    now: float = 1e6

    def __call__(self) -> float:
        return self.now


def used_up(budget: Budget, clock: Clock, wants_s: float = 1e9, step_s: float = 0.0) -> float:
    """Take a share and work on it in steps until it is used up, or nothing is left to do; the seconds that took."""
    begun, is_over = clock.now, budget.share()
    if step_s:
        while not is_over() and clock.now - begun < wants_s:
            clock.now += step_s
        return clock.now - begun
    low, high = begun, begun + wants_s
    for _ in range(100):  # when it is over is found by bisection, as a clock may be set back here
        clock.now = (low + high) / 2
        low, high = (low, clock.now) if is_over() else (clock.now, high)
    clock.now = high
    return clock.now - begun


@given(seconds, counts)
def test_the_shares_leave_a_quarter_for_the_rematch(total: float, shares: int) -> None:
    clock = Clock()
    budget = Budget(total, shares, clock=clock)
    took = sum(used_up(budget, clock) for _ in range(shares))
    assert took == pytest.approx(total * (1 - KEPT_FOR_COMPARISONS), abs=1e-6)


@given(seconds, counts)
def test_shares_that_are_all_used_are_equal(total: float, shares: int) -> None:
    clock = Clock()
    budget = Budget(total, shares, clock=clock)
    equal = total * (1 - KEPT_FOR_COMPARISONS) / shares
    assert [used_up(budget, clock) for _ in range(shares)] == pytest.approx([equal] * shares, rel=1e-3, abs=1e-6)


@given(seconds, st.integers(2, 40), st.floats(0, 1))
def test_what_one_share_leaves_goes_to_those_after_it_alike(total: float, shares: int, used: float) -> None:
    clock = Clock()
    budget = Budget(total, shares, clock=clock)
    screening = total * (1 - KEPT_FOR_COMPARISONS)
    first = used_up(budget, clock, wants_s=used * screening / shares)
    rest = [used_up(budget, clock) for _ in range(shares - 1)]
    assert rest == pytest.approx([(screening - first) / (shares - 1)] * (shares - 1), rel=1e-3, abs=1e-6)


@given(seconds, st.lists(st.floats(0, 1e5), min_size=1, max_size=20))
def test_no_share_is_less_than_nothing_whatever_those_before_it_took(total: float, overrun: list[float]) -> None:
    clock = Clock()
    budget = Budget(total, len(overrun), clock=clock)
    for late in overrun:
        begun, is_over = clock.now, budget.share()
        clock.now = begun - 1e-3
        assert not is_over()
        clock.now = begun + late


@given(seconds, counts, st.floats(0.001, 10))
def test_a_step_that_is_begun_is_all_that_a_share_runs_over(total: float, shares: int, step_s: float) -> None:
    clock = Clock()
    budget = Budget(total, shares, clock=clock)
    step_s = max(step_s, total / 1000)
    took = sum(used_up(budget, clock, step_s=step_s) for _ in range(shares))
    assert took <= total * (1 - KEPT_FOR_COMPARISONS) + step_s * shares


@given(seconds, st.integers(1, 8), st.integers(1, 5))
def test_executors_that_work_at_the_same_time_each_have_their_share_in_full(
    total: float, executors: int, rounds: int
) -> None:
    clock = Clock()
    shares = executors * rounds
    budget = Budget(total, shares, executors, clock)
    begun = clock.now
    for _ in range(rounds):
        together = [budget.share() for _ in range(executors)]
        low, high = clock.now, clock.now + total
        for _ in range(100):
            clock.now = (low + high) / 2
            low, high = (low, clock.now) if all(is_over() for is_over in together) else (clock.now, high)
        clock.now = high
    assert clock.now - begun == pytest.approx(total * (1 - KEPT_FOR_COMPARISONS), rel=1e-3, abs=1e-6)


@given(seconds, st.integers(1, 8), counts)
def test_more_shares_than_were_announced_get_no_time_beyond_the_end(total: float, executors: int, shares: int) -> None:
    clock = Clock()
    budget = Budget(total, shares, executors, clock)
    end = clock.now + total * (1 - KEPT_FOR_COMPARISONS)
    late = [budget.share() for _ in range(shares + 3)]
    clock.now = end + 1e-3
    assert all(is_over() for is_over in late)


def test_without_a_limit_nothing_is_ever_over() -> None:
    clock = Clock()
    shares = [Budget(None, 3, clock=clock).share() for _ in range(3)]
    clock.now += 1e12
    assert not any(is_over() for is_over in shares)


def test_a_budget_begins_when_it_is_made() -> None:
    clock = Clock()
    budget = Budget(100.0, 1, clock=clock)
    clock.now += 75.1
    assert budget.share()()
