"""The final comparison, on a GPU that is a table: what wins, what stays, and what can never win."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import get_args

import pytest

from sglang_moe_ext.core import Failure, MoEShape, Quantization, Scheme, TileConfig
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchLayers,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
    LayerTimes,
    Pair,
)
from sglang_moe_ext.tuning.search import statistics
from sglang_moe_ext.tuning.search.final_comparison import TOLERATED_ERROR, MeasuredChoice, confirm
from sglang_moe_ext.tuning.search.statistics import Interval

SHAPE = MoEShape(8, 64, 64, 2)
FAILED = Failure("OutOfResources", "shared memory")
ROUNDS, ROUTINGS = 16, 4
INCUMBENT = TileConfig(16, 32, 64, 1, 4, 2)
SLOW, FAST, FASTER, FASTEST = (TileConfig(16, block_n, 64, 1, 4, 3) for block_n in (32, 64, 128, 256))


def pair(up: TileConfig, down: TileConfig | None = None) -> Pair:
    return {"up": up, "down": down or up}


@dataclass(slots=True)
class TableGpu:
    """Results as a GPU would on which a layer with each configuration takes so many microseconds.

    `jitter` is a factor by place and round, `luck` one of each race, by its data and the configuration;
    `throttled_races`: the first so many are throttled, and twice as slow for all but the incumbent.
    """

    us: dict[TileConfig, float]
    errors: dict[TileConfig, float] = field(default_factory=dict)
    fails: frozenset[TileConfig] = frozenset()
    fails_beside_others: frozenset[TileConfig] = frozenset()
    unchecked: frozenset[TileConfig] = frozenset()
    jitter: Callable[[int, int], float] = lambda place, turn: 1.0
    luck: dict[tuple[int, TileConfig], float] = field(default_factory=dict)
    throttled_races: int = 0
    asked: list[BenchRequest] = field(default_factory=list)

    def __call__(self, request: BenchRequest) -> BenchResult:
        self.asked.append(request)
        match request:
            case BenchLayers(_, pairs, rounds, _, data):
                return self._raced([racer["up"] for racer in pairs], rounds, data)
            case CheckAccuracy(_, checked):
                return FAILED if checked["up"] in self.unchecked else Accuracy(self.errors.get(checked["up"], 1e-3))
            case _:
                raise AssertionError(request)

    def _raced(self, configs: list[TileConfig], rounds: int, data: int) -> BenchResult:
        if self.fails & set(configs) or (len(configs) > 1 and self.fails_beside_others & set(configs)):
            return FAILED
        throttled = len(self.races) <= self.throttled_races
        rows = [
            tuple(
                self.us[config]
                * (2 if throttled and config != INCUMBENT else 1)
                * self.luck.get((data, config), 1.0)
                * self.jitter(place, turn)
                for turn in range(rounds)
            )
            for place, config in enumerate(configs)
        ]
        return LayerTimes(tuple(rows), ROUTINGS, "too hot" if throttled else None, 1980)

    @property
    def races(self) -> list[BenchLayers]:
        return [request for request in self.asked if isinstance(request, BenchLayers)]

    @property
    def checked(self) -> list[TileConfig]:
        return [request.pair["up"] for request in self.asked if isinstance(request, CheckAccuracy)]


def decided(gpu: TableGpu, shape: MoEShape = SHAPE, finalists: Sequence[Pair] | None = None) -> MeasuredChoice | None:
    if finalists is None:
        finalists = [pair(config) for config in gpu.us if config != INCUMBENT]
    return confirm(shape, 64, finalists, pair(INCUMBENT), gpu, rounds=ROUNDS, tried=7, failures={"OutOfResources": 2})


def chosen(gpu: TableGpu, shape: MoEShape = SHAPE) -> MeasuredChoice:
    found = decided(gpu, shape)
    assert found is not None
    return found


def test_the_fastest_right_pair_is_chosen() -> None:
    assert chosen(TableGpu({INCUMBENT: 10, SLOW: 12, FAST: 8, FASTER: 6})).pair == pair(FASTER)


@pytest.mark.parametrize("error", [0.5, float("nan"), float("inf")], ids=["wrong", "nan", "infinite"])
def test_a_fast_wrong_config_is_never_chosen(error: float) -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 8, FASTEST: 1}, errors={FASTEST: error})
    assert chosen(gpu).pair == pair(FAST)


def test_a_warning_names_the_fast_wrong_config(caplog: pytest.LogCaptureFixture) -> None:
    chosen(TableGpu({INCUMBENT: 10, FASTEST: 1}, errors={FASTEST: 0.5}))
    assert [record.getMessage() for record in caplog.records if str(FASTEST) in record.getMessage()] == [
        f"M=64: up {FASTEST}, down {FASTEST} is WRONG (relative error 0.5): left out"
    ]


def test_where_all_that_is_fast_is_wrong_the_incumbent_stays() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 8, FASTEST: 1}, errors={FAST: 0.5, FASTEST: 0.5})
    assert chosen(gpu).pair == pair(INCUMBENT)


def test_a_config_whose_check_fails_is_not_chosen() -> None:
    gpu = TableGpu({INCUMBENT: 10, FASTEST: 1}, unchecked=frozenset({FASTEST}))
    assert chosen(gpu).pair == pair(INCUMBENT)


def test_the_incumbent_is_checked_before_it_stays() -> None:
    gpu = TableGpu({INCUMBENT: 10, SLOW: 12}, errors={INCUMBENT: 2e-3})
    assert chosen(gpu).error == 2e-3


def test_a_wrong_incumbent_gives_way_to_a_slower_right_one() -> None:
    gpu = TableGpu({INCUMBENT: 10, SLOW: 12, FAST: 11}, errors={INCUMBENT: 0.5})
    assert chosen(gpu).pair == pair(FAST)


def test_the_gain_of_a_slower_one_is_below_one() -> None:
    assert chosen(TableGpu({INCUMBENT: 10, SLOW: 12}, errors={INCUMBENT: 0.5})).gain.value == pytest.approx(10 / 12)


def test_where_nothing_that_runs_is_right_nothing_is_chosen() -> None:
    assert decided(TableGpu({INCUMBENT: 10, FAST: 8}, errors={INCUMBENT: 0.5, FAST: 0.5})) is None


def test_what_cannot_win_is_not_checked() -> None:
    gpu = TableGpu({INCUMBENT: 10, SLOW: 12, FAST: 8, FASTER: 6})
    chosen(gpu)
    assert gpu.checked == [FASTER]


@pytest.mark.parametrize("us", [10.0, 9.95, 12.0], ids=["as fast", "faster by less than 1 %", "slower"])
def test_the_incumbent_stays_unless_it_is_clearly_beaten(us: float) -> None:
    assert chosen(TableGpu({INCUMBENT: 10, FAST: us})).pair == pair(INCUMBENT)


def test_a_gain_of_two_percent_without_noise_is_taken() -> None:
    assert chosen(TableGpu({INCUMBENT: 10, FAST: 9.8})).pair == pair(FAST)


def test_the_incumbent_stays_within_the_noise() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 9}, jitter=lambda place, _: 0.9 if place == 2 else 1.0)
    assert chosen(gpu).pair == pair(INCUMBENT)


def test_a_gain_that_may_be_none_is_not_taken() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 9.7}, jitter=lambda place, turn: 1 + 0.3 * math.sin(7 * turn) * (place == 1))
    assert chosen(gpu).pair == pair(INCUMBENT)


def test_who_led_by_luck_gives_way_to_the_next_that_stands() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 9, FASTER: 10}, luck={(0, FASTER): 0.5})
    assert (chosen(gpu).pair, gpu.checked) == (pair(FAST), [FASTER, FAST])


def test_the_figures_are_those_of_the_meeting_with_the_incumbent() -> None:
    found = chosen(TableGpu({INCUMBENT: 10, FAST: 8}, luck={(0, FAST): 0.5, (1, INCUMBENT): 1.2}))
    assert (found.us, found.incumbent_us, found.gain.value) == pytest.approx((8, 12, 1.5))


def test_no_more_than_three_meet_the_incumbent() -> None:
    gpu = TableGpu(
        {INCUMBENT: 10, **dict.fromkeys((SLOW, FAST, FASTER), 9.999), FASTEST: 9},
        luck=dict.fromkeys([(0, SLOW), (0, FAST), (0, FASTER)], 0.5),
    )
    assert (chosen(gpu).pair, [race.data for race in gpu.races]) == (pair(INCUMBENT), [0, 1, 1, 1])


def test_a_wrong_one_that_led_takes_no_ones_place_in_the_meetings() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 8, FASTEST: 1}, errors={FASTEST: 0.5})
    assert (chosen(gpu).pair, gpu.races[1:]) == (
        pair(FAST),
        [BenchLayers(64, (pair(INCUMBENT), pair(FAST), pair(INCUMBENT)), ROUNDS, data=1)],
    )


@dataclass(slots=True)
class NoisyGpu:
    """Every sample differs by a lognormal factor, of so much, from what its configuration takes."""

    us: dict[TileConfig, float]
    sigma: float
    dice: random.Random

    def __call__(self, request: BenchRequest) -> BenchResult:
        if isinstance(request, CheckAccuracy):
            return Accuracy(1e-3)
        assert isinstance(request, BenchLayers)
        rows = [
            tuple(self.us[racer["up"]] * self.dice.lognormvariate(0, self.sigma) for _ in range(request.rounds))
            for racer in request.pairs
        ]
        return LayerTimes(tuple(rows), ROUTINGS)


def replaced(us: dict[TileConfig, float], sigma: float, trials: int) -> float:
    """In how many of the trials the incumbent does not stay."""
    dice = random.Random(1)
    finalists = [pair(config) for config in us if config != INCUMBENT]
    found = [
        confirm(SHAPE, 64, finalists, pair(INCUMBENT), NoisyGpu(us, sigma, dice), rounds=ROUNDS, tried=8, failures={})
        for _ in range(trials)
    ]
    return sum(one is not None and one.pair != pair(INCUMBENT) for one in found) / trials


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bounds, less smooth, five times as soon."""
    monkeypatch.setattr(statistics, "_RESAMPLES", 200)
    monkeypatch.setattr(statistics, "_TAIL", 5)


@pytest.mark.usefixtures("few_resamples")
def test_the_best_of_eight_that_are_like_the_incumbent_rarely_replaces_it() -> None:
    like_it = {TileConfig(16, 32, 64, group, 4, 3): 10.0 for group in range(1, 9)}
    assert replaced({INCUMBENT: 10.0, **like_it}, sigma=0.03, trials=200) <= 0.03


@pytest.mark.usefixtures("few_resamples")
def test_a_gain_of_three_percent_is_nearly_always_found_within_one_percent_of_noise() -> None:
    like_it = {TileConfig(16, 32, 64, group, 4, 3): 10.0 for group in range(1, 8)}
    assert replaced({INCUMBENT: 10.0, **like_it, FAST: 10 / 1.03}, sigma=0.01, trials=50) >= 0.96


@pytest.mark.parametrize("factor", [1.25, 0.8], ids=["slower", "faster"])
def test_the_noise_is_how_much_the_incumbent_differs_from_itself(factor: float) -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 5}, jitter=lambda place, _: factor if place == 2 else 1.0)
    assert chosen(gpu).noise == pytest.approx(0.25)


def test_the_gain_is_over_both_runs_of_the_incumbent() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 5}, jitter=lambda place, _: 1.2 if place == 2 else 1.0)
    assert chosen(gpu).gain.value == pytest.approx(2.2)


def test_a_gpu_that_slows_down_during_the_race_changes_no_verdict() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 9.5}, jitter=lambda _, turn: 1 + turn / 10)
    assert chosen(gpu).pair == pair(FAST)


def test_the_gain_is_how_many_times_faster_than_the_incumbent() -> None:
    assert chosen(TableGpu({INCUMBENT: 10, FAST: 8})).gain.value == pytest.approx(1.25)


def test_where_the_incumbent_stays_there_is_no_gain() -> None:
    assert chosen(TableGpu({INCUMBENT: 10, SLOW: 12})).gain == Interval(1, 1, 1)


def test_times_before_and_after_are_those_of_the_race() -> None:
    found = chosen(TableGpu({INCUMBENT: 10, FAST: 8}))
    assert (found.incumbent_us, found.us) == (10, 8)


def test_what_the_screening_counted_is_kept() -> None:
    found = chosen(TableGpu({INCUMBENT: 10, FAST: 8}))
    assert (found.tried, found.failures) == (7, {"OutOfResources": 2})


def test_without_finalists_the_incumbent_stays() -> None:
    assert chosen(TableGpu({INCUMBENT: 10})).pair == pair(INCUMBENT)


def test_up_and_down_may_take_different_configs() -> None:
    mixed = pair(FAST, FASTER)
    found = decided(TableGpu({INCUMBENT: 10, FAST: 8}), finalists=[mixed])
    assert found is not None and found.pair == mixed


def test_the_incumbent_races_first_and_last() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 8})
    chosen(gpu)
    assert [race.pairs for race in gpu.races] == [(pair(INCUMBENT), pair(FAST), pair(INCUMBENT))] * 2


def test_a_finalist_that_is_the_incumbent_or_comes_twice_races_once() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 8})
    decided(gpu, finalists=[pair(FAST), pair(INCUMBENT), pair(FAST)])
    assert gpu.races[0].pairs == (pair(INCUMBENT), pair(FAST), pair(INCUMBENT))


def test_what_breaks_the_race_is_left_out_and_the_rest_race_again() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 8, FASTEST: 1}, fails=frozenset({FASTEST}))
    assert (chosen(gpu).pair, gpu.races[-1].pairs) == (pair(FAST), (pair(INCUMBENT), pair(FAST), pair(INCUMBENT)))


def test_where_no_finalist_can_run_the_incumbent_stays() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 8, FASTER: 6}, fails=frozenset({FAST, FASTER}))
    assert chosen(gpu).pair == pair(INCUMBENT)


def test_an_incumbent_that_cannot_run_loses_to_the_fastest_right_one_that_can() -> None:
    gpu = TableGpu({INCUMBENT: 10, SLOW: 12, FAST: 8, FASTEST: 1}, fails=frozenset({INCUMBENT}), errors={FASTEST: 0.5})
    assert chosen(gpu).pair == pair(FAST)


def test_an_incumbent_that_cannot_run_is_infinitely_slow_and_has_no_noise() -> None:
    found = chosen(TableGpu({INCUMBENT: 10, SLOW: 12}, fails=frozenset({INCUMBENT})))
    assert (found.incumbent_us, found.gain.value, found.noise) == (math.inf, math.inf, None)


def test_where_nothing_runs_nothing_is_chosen() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 8}, fails=frozenset({INCUMBENT, FAST}))
    assert decided(gpu) is None


def test_where_no_rival_runs_beside_the_incumbent_it_stays() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 8}, fails_beside_others=frozenset({FAST}))
    assert chosen(gpu).pair == pair(INCUMBENT)


def test_no_question_is_asked_twice() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 8}, fails_beside_others=frozenset({FAST}), throttled_races=9)
    decided(gpu)
    assert all(request not in gpu.asked[:place] for place, request in enumerate(gpu.asked))


def test_a_throttled_race_is_run_again() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 8}, throttled_races=1)
    found = chosen(gpu)
    attempts = [(race.data, race.attempt) for race in gpu.races]
    assert (found.pair, found.throttled, attempts) == (pair(FAST), False, [(0, 0), (0, 1), (1, 0)])


def test_a_race_that_is_always_throttled_is_taken_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 8}, throttled_races=99)
    with caplog.at_level(logging.WARNING):
        found = chosen(gpu)
    assert (found.throttled, len(gpu.races), "too hot" in caplog.text) == (True, 3, True)


@pytest.mark.parametrize(
    ("scheme", "winner"),
    [(None, INCUMBENT), ("int4_w4a16", INCUMBENT), ("fp8_w8a8", FAST), ("int8_w8a8", FAST)],
    ids=["bf16", "int4", "fp8", "int8"],
)
def test_an_error_of_two_percent_is_right_for_eight_bit_activations_alone(
    scheme: Scheme | None, winner: TileConfig
) -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 8}, errors={FAST: 2e-2})
    assert chosen(gpu, MoEShape(8, 64, 64, 2, Quantization(scheme))).pair == pair(winner)


def test_every_scheme_has_an_error_that_is_tolerated() -> None:
    assert set(TOLERATED_ERROR) == {None, *get_args(Scheme)}
