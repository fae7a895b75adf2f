"""Races on a GPU that has room for so many layers: who comes to the end, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from sglang_moe_ext.core import Failure, TileConfig
from sglang_moe_ext.tuning.bench.messages import Accuracy, BenchLayers, BenchRequest, BenchResult, LayerTimes, Pair
from sglang_moe_ext.tuning.search.final_comparison import ComparedLayer, InterleavedComparison, interleave
from sglang_moe_ext.tuning.search.statistics import Interval

ROUNDS = 4
BROKEN = Failure("OutOfResources", "shared memory")
SLOW = Failure("Timeout", "no result")
CROWDED = Failure("Timeout", "runs alone, but not beside the others: no result")


def pair(number: int) -> Pair:
    config = TileConfig(16, 64, 64, number + 1, 4, 3)
    return {"up": config, "down": config}


INCUMBENT, RIVALS = pair(0), [pair(number) for number in range(1, 9)]


@dataclass(slots=True)
class SmallGpu:
    """Pair number n takes 10 + n microseconds; a race of more than `room` layers has no end, one of `broken` none."""

    room: int = 99
    broken: tuple[Pair, ...] = ()
    throttled_races: int = 0
    asked: list[BenchLayers] = field(default_factory=list)

    def __call__(self, request: BenchRequest) -> BenchResult:
        assert isinstance(request, BenchLayers)
        self.asked.append(request)
        if any(racer in self.broken for racer in request.pairs):
            return BROKEN
        if len(request.pairs) > self.room:
            return SLOW
        us = tuple((9.0 + racer["up"].group_m,) * request.rounds for racer in request.pairs)
        return LayerTimes(us, 1, "too hot" if len(self.asked) <= self.throttled_races else None)

    @property
    def fields(self) -> list[int]:
        """How many layers took part in each race of several."""
        return [len(race.pairs) for race in self.asked if len(race.pairs) > 1]


def raced(gpu: SmallGpu, incumbent: Pair | None = INCUMBENT) -> InterleavedComparison:
    return interleave(64, incumbent, RIVALS, gpu, rounds=ROUNDS)


def finished(found: InterleavedComparison) -> list[int]:
    """The numbers of the challengers that came to the end."""
    return [number for number, challenger in enumerate(found.challengers, 1) if isinstance(challenger, ComparedLayer)]


def test_the_incumbent_runs_first_and_last() -> None:
    gpu = SmallGpu()
    raced(gpu)
    assert [race.pairs for race in gpu.asked] == [(INCUMBENT, *RIVALS, INCUMBENT)]


def test_an_incumbent_gains_nothing_over_itself() -> None:
    assert raced(SmallGpu()).incumbent == ComparedLayer((10.0,) * ROUNDS, 10.0, Interval(1, 1, 1))


def test_the_field_is_halved_until_it_has_room_and_the_incumbent_stays_in() -> None:
    gpu = SmallGpu(room=4)
    found = raced(gpu)
    assert (gpu.fields, finished(found), gpu.asked[-1].pairs[0]) == ([10, 6, 4], [1, 2], INCUMBENT)


def test_who_was_cut_is_told_that_it_runs_alone() -> None:
    assert raced(SmallGpu(room=4)).challengers[2:] == (CROWDED,) * 6


def test_where_there_is_room_for_no_rival_the_incumbent_alone_has_a_time() -> None:
    found = raced(SmallGpu(room=2))
    assert (isinstance(found.incumbent, ComparedLayer), finished(found)) == (True, [])


def test_where_there_is_room_for_nothing_each_has_its_reason() -> None:
    found = raced(SmallGpu(room=1))
    assert (found.times, {found.incumbent, *found.challengers}) == (None, {CROWDED})


def test_without_an_incumbent_the_field_is_halved_down_to_one() -> None:
    gpu = SmallGpu(room=1)
    found = raced(gpu, incumbent=None)
    assert (gpu.fields, finished(found), found.incumbent) == ([8, 4, 2], [1], None)


def test_a_broken_one_is_left_out_before_the_field_is_halved() -> None:
    gpu = SmallGpu(room=6, broken=(RIVALS[0],))
    found = raced(gpu)
    assert (gpu.fields, finished(found), found.challengers[0]) == ([10, 9, 5], [2, 3, 4], BROKEN)


def test_what_breaks_a_small_race_is_found_alone() -> None:
    found = raced(SmallGpu(broken=(RIVALS[7],)))
    assert (finished(found), found.challengers[7]) == ([1, 2, 3, 4, 5, 6, 7], BROKEN)


def test_over_a_broken_incumbent_there_is_no_gain_and_no_noise() -> None:
    found = raced(SmallGpu(broken=(INCUMBENT,)))
    gains = {challenger.gain for challenger in found.challengers if isinstance(challenger, ComparedLayer)}
    assert (found.incumbent, gains, found.noise) == (BROKEN, {None}, None)


def test_where_nobody_starts_nothing_is_asked() -> None:
    gpu = SmallGpu()
    assert (interleave(64, None, [], gpu, rounds=ROUNDS), gpu.asked) == (
        InterleavedComparison(None, (), None, None),
        [],
    )


def test_every_race_is_on_the_data_that_was_asked_for() -> None:
    gpu = SmallGpu(room=4)
    interleave(64, INCUMBENT, RIVALS, gpu, rounds=ROUNDS, data=3)
    assert {race.data for race in gpu.asked} == {3}


@pytest.mark.parametrize(
    ("throttled", "attempts", "why"),
    [(0, [0], None), (2, [0, 1, 2], None), (99, [0, 1, 2], "too hot")],
    ids=["never", "twice", "always"],
)
def test_a_throttled_race_is_run_again_twice(throttled: int, attempts: list[int], why: str | None) -> None:
    gpu = SmallGpu(throttled_races=throttled)
    found = raced(gpu)
    assert found.times is not None
    assert ([race.attempt for race in gpu.asked], found.times.throttled) == (attempts, why)


def test_an_answer_to_another_question_is_a_mistake() -> None:
    with pytest.raises(TypeError, match="Accuracy"):
        interleave(64, INCUMBENT, RIVALS, lambda _: Accuracy(0.1), rounds=ROUNDS)
