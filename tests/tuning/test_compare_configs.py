"""Given choices beside the engine's own, on a GPU that is a table: what is timed, checked, and left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from sglang_moe_ext.core import Failure, MoEShape, Quantization, TileConfig
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchLayers,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
    LayerTimes,
    Pair,
)
from sglang_moe_ext.tuning.compare_configs import TODAY, ConfigComparison, TimedConfig, compare_all
from sglang_moe_ext.tuning.search.final_comparison import is_right
from sglang_moe_ext.tuning.search.statistics import Interval

ROUNDS, ROUTINGS = 16, 4
FAILED = Failure("OutOfResources", "shared memory")
NOW, SLOW, FAST, FASTER = (TileConfig(16, block_n, 64, 1, 4, 3) for block_n in (32, 64, 128, 256))


def pair(up: TileConfig, down: TileConfig | None = None) -> Pair:
    return {"up": up, "down": down or up}


@dataclass(slots=True)
class TableGpu:
    """Results as a GPU would on which a layer with each up configuration takes so many microseconds.

    `jitter` is a factor by place and round; `throttled_races`: the first so many.
    """

    us: dict[TileConfig, float]
    errors: dict[TileConfig, float | Failure] = field(default_factory=dict)
    fails: frozenset[TileConfig] = frozenset()
    fails_beside_others: frozenset[TileConfig] = frozenset()
    jitter: Callable[[int, int], float] = lambda place, turn: 1.0
    throttled_races: int = 0
    asked: list[BenchRequest] = field(default_factory=list)

    def __call__(self, request: BenchRequest) -> BenchResult:
        self.asked.append(request)
        match request:
            case BenchLayers(_, pairs, rounds):
                return self._raced([racer["up"] for racer in pairs], rounds)
            case CheckAccuracy(_, checked):
                error = self.errors.get(checked["up"], 1e-3)
                return error if isinstance(error, Failure) else Accuracy(error)
            case _:
                raise AssertionError(request)

    def _raced(self, configs: list[TileConfig], rounds: int) -> BenchResult:
        if self.fails & set(configs) or (len(configs) > 1 and self.fails_beside_others & set(configs)):
            return FAILED
        rows = [
            tuple(self.us[config] * self.jitter(place, turn) for turn in range(rounds))
            for place, config in enumerate(configs)
        ]
        return LayerTimes(tuple(rows), ROUTINGS, "too hot" if len(self.races) <= self.throttled_races else None)

    @property
    def races(self) -> list[BenchLayers]:
        return [request for request in self.asked if isinstance(request, BenchLayers)]

    @property
    def checked(self) -> list[TileConfig]:
        return [request.pair["up"] for request in self.asked if isinstance(request, CheckAccuracy)]


def nothing_against(_: Pair) -> Failure | None:
    return None


def outcome(
    gpu: TableGpu, trouble: Callable[[Pair], Failure | None] = nothing_against, **given: TileConfig
) -> ConfigComparison:
    pairs = {name: pair(config) for name, config in given.items()}
    return compare_all(64, pair(NOW), pairs, trouble, gpu, rounds=ROUNDS)


def timed(found: ConfigComparison, name: str) -> TimedConfig:
    result = found.results[name]
    assert isinstance(result, TimedConfig), result
    return result


def test_the_gain_is_how_many_times_faster_than_today_a_choice_is() -> None:
    found = outcome(TableGpu({NOW: 10, FAST: 8, SLOW: 20}), fast=FAST, slow=SLOW)
    gains = [timed(found, name).gain for name in ("fast", "slow")]
    assert [over_today and over_today.value for over_today in gains] == pytest.approx([1.25, 0.5])


def test_times_are_those_of_the_race() -> None:
    found = outcome(TableGpu({NOW: 10, FAST: 8}), fast=FAST)
    assert {name: timed(found, name).us for name in found.results} == {TODAY: 10, "fast": 8}


def test_today_comes_first_and_has_no_gain_over_itself() -> None:
    found = outcome(TableGpu({NOW: 10, FAST: 8}), fast=FAST)
    assert (list(found.results), timed(found, TODAY).gain) == ([TODAY, "fast"], Interval(1, 1, 1))


def test_all_race_together_and_today_runs_first_and_last() -> None:
    gpu = TableGpu({NOW: 10, FAST: 8, SLOW: 12})
    outcome(gpu, fast=FAST, slow=SLOW)
    assert [race.pairs for race in gpu.races] == [(pair(NOW), pair(FAST), pair(SLOW), pair(NOW))]


@pytest.mark.parametrize("factor", [1.25, 0.8], ids=["slower", "faster"])
def test_the_noise_is_how_much_today_differs_from_itself(factor: float) -> None:
    gpu = TableGpu({NOW: 10, FAST: 5}, jitter=lambda place, _: factor if place == 2 else 1.0)
    assert outcome(gpu, fast=FAST).noise == pytest.approx(0.25)


def test_a_doubtful_gain_has_an_interval_that_holds_one() -> None:
    gpu = TableGpu({NOW: 10, FAST: 9.7}, jitter=lambda place, turn: 1 + 0.3 * math.sin(7 * turn) * (place == 1))
    over_today = timed(outcome(gpu, fast=FAST), "fast").gain
    assert over_today is not None and over_today.low < 1 < over_today.high


def test_a_choice_that_comes_twice_races_once_and_is_told_twice() -> None:
    gpu = TableGpu({NOW: 10, FAST: 8})
    found = outcome(gpu, one=FAST, same=FAST)
    assert (len(gpu.races[0].pairs), found.results["one"]) == (3, found.results["same"])


def test_a_choice_that_is_todays_has_no_gain() -> None:
    assert timed(outcome(TableGpu({NOW: 10}), same=NOW), "same").gain == Interval(1, 1, 1)


def test_up_and_down_may_differ() -> None:
    found = compare_all(
        64, pair(NOW), {"mixed": pair(FAST, FASTER)}, nothing_against, TableGpu({NOW: 10, FAST: 8}), rounds=ROUNDS
    )
    assert (found.pairs["mixed"], timed(found, "mixed").us) == (pair(FAST, FASTER), 8)


def test_each_that_runs_is_checked_the_slow_ones_as_well() -> None:
    gpu = TableGpu({NOW: 10, FAST: 8, SLOW: 12})
    outcome(gpu, fast=FAST, slow=SLOW)
    assert gpu.checked == [NOW, FAST, SLOW]


def test_a_wrong_choice_is_told_with_its_time_and_its_error() -> None:
    found = outcome(TableGpu({NOW: 10, FAST: 1}, errors={FAST: 0.5}), fast=FAST)
    assert (timed(found, "fast").us, timed(found, "fast").error) == (1, 0.5)


def test_a_check_that_fails_costs_no_time() -> None:
    found = outcome(TableGpu({NOW: 10, FAST: 8}, errors={FAST: FAILED}), fast=FAST)
    assert (timed(found, "fast").us, timed(found, "fast").error) == (8, FAILED)


def test_a_choice_that_cannot_run_costs_itself_alone() -> None:
    gpu = TableGpu({NOW: 10, FAST: 8, FASTER: 6}, fails=frozenset({FASTER}))
    found = outcome(gpu, broken=FASTER, fast=FAST)
    assert (found.results["broken"], timed(found, "fast").us, gpu.races[-1].pairs) == (
        FAILED,
        8,
        (pair(NOW), pair(FAST), pair(NOW)),
    )


def test_what_has_no_binary_never_runs() -> None:
    gpu = TableGpu({NOW: 10, FAST: 8, FASTER: 6})
    found = outcome(gpu, lambda of: FAILED if of == pair(FASTER) else None, broken=FASTER, fast=FAST)
    raced = [racer for race in gpu.races for racer in race.pairs]
    assert (found.results["broken"], pair(FASTER) in raced, len(gpu.races)) == (FAILED, False, 1)


def test_where_today_cannot_run_the_others_have_times_without_gains() -> None:
    found = outcome(TableGpu({NOW: 10, FAST: 8}, fails=frozenset({NOW})), fast=FAST)
    assert (found.results[TODAY], found.noise, timed(found, "fast")) == (FAILED, None, TimedConfig(8, None, 1e-3))


def test_where_nothing_runs_each_has_its_reason() -> None:
    found = outcome(TableGpu({NOW: 10, FAST: 8}, fails=frozenset({NOW, FAST})), fast=FAST)
    assert found.results == {TODAY: FAILED, "fast": FAILED}


def test_where_nothing_has_a_binary_nothing_is_asked() -> None:
    gpu = TableGpu({NOW: 10, FAST: 8})
    assert (outcome(gpu, lambda _: FAILED, fast=FAST).results, gpu.asked) == ({TODAY: FAILED, "fast": FAILED}, [])


def test_what_runs_alone_but_not_beside_others_says_so() -> None:
    found = outcome(TableGpu({NOW: 10, FAST: 8}, fails_beside_others=frozenset({FAST})), fast=FAST)
    result = found.results["fast"]
    assert isinstance(result, Failure) and result.message.startswith("runs alone, but not")


def test_where_one_runs_beside_no_other_the_first_half_still_has_times() -> None:
    gpu = TableGpu({NOW: 10, FAST: 8, SLOW: 12}, fails_beside_others=frozenset({SLOW}))
    found = outcome(gpu, fast=FAST, slow=SLOW)
    assert (timed(found, "fast").us, isinstance(found.results["slow"], Failure)) == (8, True)


def test_a_throttled_race_is_run_again() -> None:
    gpu = TableGpu({NOW: 10, FAST: 8}, throttled_races=1)
    assert (outcome(gpu, fast=FAST).throttled, [race.attempt for race in gpu.races]) == (None, [0, 1])


def test_a_race_that_is_always_throttled_is_taken_and_says_so() -> None:
    gpu = TableGpu({NOW: 10, FAST: 8}, throttled_races=99)
    assert (outcome(gpu, fast=FAST).throttled, len(gpu.races)) == ("too hot", 3)


def test_no_question_is_asked_twice() -> None:
    gpu = TableGpu({NOW: 10, FAST: 8, SLOW: 9}, fails_beside_others=frozenset({FAST}), throttled_races=9)
    outcome(gpu, fast=FAST, slow=SLOW)
    assert all(request not in gpu.asked[:place] for place, request in enumerate(gpu.asked))


@pytest.mark.parametrize("error", [0.5, math.inf, math.nan, FAILED], ids=["wrong", "infinite", "nan", "unknown"])
def test_only_a_small_error_is_right(error: float | Failure) -> None:
    assert not is_right(MoEShape(8, 64, 64, 2), error)


def test_eight_bit_activations_may_differ_more() -> None:
    assert is_right(MoEShape(8, 64, 64, 2, Quantization("fp8_w8a8")), 2e-2)
