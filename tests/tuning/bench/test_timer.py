"""The stopwatch on a GPU that is a list: what was queued, and when the GPU gets there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext.tuning.bench.timer import LaunchQueue, Stopwatch


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu, self._at = gpu, 0
        self._was_late = False

    def record(self) -> None:
        self._at = self._gpu.now
        self._was_late = self._gpu.is_late

    def query(self) -> bool:
        return self._was_late

    def elapsed_time(self, end_event: FakeEvent) -> float:
        assert self._gpu.queued[-1] == "synchronize"
        return (end_event._at - self._at) * 1e-3


class FakeGpu:
    """`late`: whether the host comes too late with its n-th launch; for ever in time after them.

    `needed`: clock cycles that the GPU must be kept busy for a launch to be in time otherwise.
    """

    def __init__(self, late: Iterable[bool] = (), needed: int = 0) -> None:
        self._late, self._needed = iter(late), needed
        self.queued: list[object] = []
        self.now = 0
        self.waits: list[int] = []
        self.is_late = False

    def flush(self) -> None:
        self.queued.append("flush")
        self.waits.append(0)
        self.is_late = next(self._late, False) or self._needed > 0

    def sleep(self, cycles: int) -> None:
        self.queued.append("sleep")
        self.waits[-1] = cycles
        if cycles >= self._needed > 0:
            self.is_late = False

    def launch(self, name: str, us: int) -> Callable[[int], object]:
        def queue(turn: int) -> None:
            self.queued.append((name, turn))
            self.now += us

        return queue

    def stopwatch(self) -> Stopwatch:
        return Stopwatch(
            LaunchQueue(lambda: FakeEvent(self), self.sleep, self.flush, lambda: self.queued.append("synchronize"))
        )


LEAST = 100_000
MOST = 51_200_000


def sampled(gpu: FakeGpu, stopwatch: Stopwatch, samples: int) -> list[int]:
    """The waits before each launch that it takes."""
    before = len(gpu.waits)
    stopwatch.rounds([gpu.launch("a", 7)], range(samples))
    return gpu.waits[before:]


def test_launches_take_turns_behind_a_cold_cache_and_are_waited_for_once() -> None:
    gpu = FakeGpu()
    gpu.stopwatch().rounds([gpu.launch("a", 7), gpu.launch("b", 3)], [0, 5])
    assert gpu.queued == ["flush", ("a", 0), "flush", ("b", 0), "flush", ("a", 5), "flush", ("b", 5), "synchronize"]


def test_times_are_microseconds_by_turn_and_launch() -> None:
    gpu = FakeGpu()
    us = gpu.stopwatch().rounds([gpu.launch("a", 7), gpu.launch("b", 3)], range(2))
    assert us == [pytest.approx([7.0, 3.0])] * 2


def test_meanwhile_comes_when_all_is_queued_and_nothing_is_waited_for() -> None:
    gpu = FakeGpu()
    gpu.stopwatch().rounds([gpu.launch("a", 7)], range(2), lambda: gpu.queued.append("meanwhile"))
    assert gpu.queued[-3:] == [("a", 1), "meanwhile", "synchronize"]


def test_a_launch_in_time_is_not_kept_waiting() -> None:
    gpu = FakeGpu()
    assert sampled(gpu, gpu.stopwatch(), 200) == [0] * 200


def test_a_launch_that_was_late_once_is_tried_again_behind_the_same_wait() -> None:
    gpu = FakeGpu(late=[True])
    assert sampled(gpu, gpu.stopwatch(), 2) == [0, 0, 0]


def test_late_launches_that_do_not_follow_each_other_leave_the_wait_alone() -> None:
    gpu = FakeGpu(late=[True, False] * 50)
    assert set(sampled(gpu, gpu.stopwatch(), 60)) == {0}


def test_a_late_sample_is_not_answered() -> None:
    gpu = FakeGpu(late=[True, True, True])
    assert len(gpu.stopwatch().rounds([gpu.launch("a", 7)], [0])[0]) == 1
    assert gpu.queued.count(("a", 0)) == 4


def test_the_wait_doubles_until_the_launches_are_in_time() -> None:
    gpu = FakeGpu(needed=3 * LEAST)
    assert sampled(gpu, gpu.stopwatch(), 2) == [0, 0, LEAST, LEAST, 2 * LEAST, 2 * LEAST, 4 * LEAST, 4 * LEAST]


def test_all_samples_of_a_call_stand_behind_one_wait() -> None:
    """What the flush left in the L2 is written back meanwhile: a launch behind a longer wait is a faster one."""
    gpu = FakeGpu(late=[False] * 5 + [True] * 2)
    waits = sampled(gpu, gpu.stopwatch(), 6)
    assert waits[-6:] == [LEAST] * 6


def test_a_wait_once_needed_is_kept_by_later_calls() -> None:
    gpu = FakeGpu(late=[True] * 2)
    stopwatch = gpu.stopwatch()
    sampled(gpu, stopwatch, 1)
    assert set(sampled(gpu, stopwatch, 500)) == {LEAST}


def test_launches_that_are_late_behind_the_longest_wait_are_an_error_and_no_time() -> None:
    gpu = FakeGpu(late=itertools.repeat(True))
    with pytest.raises(RuntimeError, match="too busy to time on"):
        gpu.stopwatch().rounds([gpu.launch("a", 7)], [0])
    assert gpu.waits[-2:] == [MOST, MOST]


def test_what_comes_after_such_an_error_does_not_wait_for_it() -> None:
    gpu = FakeGpu(late=[True] * 22)
    stopwatch = gpu.stopwatch()
    with pytest.raises(RuntimeError):
        sampled(gpu, stopwatch, 1)
    assert sampled(gpu, stopwatch, 1) == [0]


@given(st.lists(st.booleans(), max_size=300), st.integers(1, 40))
def test_every_time_is_that_of_a_launch_that_was_in_time(late: list[bool], samples: int) -> None:
    gpu = FakeGpu(late)

    def queue(turn: int) -> None:
        gpu.now += 1000 if gpu.is_late else 1

    try:
        times = gpu.stopwatch().rounds([queue], range(samples))
    except RuntimeError:
        return
    assert times == [pytest.approx([1.0])] * samples
