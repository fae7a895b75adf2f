"""Choosing by measurement, on a GPU that is a table: what wins, what stays, and what can never win."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from sglang_moe_ext.core import Failure, MoEShape, Quantisation, Scheme, TileConfig
from sglang_moe_ext.tuning import measured
from sglang_moe_ext.tuning.measured import Measured
from sglang_moe_ext.tuning.worker import Check, Pair, Race, Screen

SHAPE = MoEShape(8, 64, 64, 2)
FAILED = Failure("OutOfResources", "shared memory")
INCUMBENT = TileConfig(16, 32, 64, 1, 4, 2)
SLOW, FAST, FASTER, FASTEST = (TileConfig(16, block_n, 64, 1, 4, 3) for block_n in (32, 64, 128, 256))
OTHER_BLOCK_M = TileConfig(64, 64, 64, 1, 4, 3)


def pair(up: TileConfig, down: TileConfig | None = None) -> Pair:
    return {"up": up, "down": down or up}


@dataclass(slots=True)
class TableGpu:
    """Answers as a GPU would on which each configuration takes so many microseconds a GEMM."""

    us: dict[TileConfig, float]
    down_us: dict[TileConfig, float] = field(default_factory=dict)
    errors: dict[TileConfig, float] = field(default_factory=dict)
    fails: frozenset[TileConfig] = frozenset()
    fails_in_a_race: frozenset[TileConfig] = frozenset()
    jitter: Callable[[int, int], float] = lambda place, turn: 1.0
    asked: list[Screen | Race | Check] = field(default_factory=list)

    def pair_us(self, of: Pair) -> float:
        return self.us[of["up"]] + self.down_us.get(of["down"], self.us[of["down"]])

    def __call__(self, request: Screen | Race | Check) -> object:
        self.asked.append(request)
        match request:
            case Screen():
                if request.config in self.fails:
                    return FAILED
                times = self.us if request.projection == "up" else self.us | self.down_us
                return [times[request.config]] * request.samples
            case Race():
                if any(self.fails_in_a_race & set(racer.values()) for racer in request.pairs):
                    return FAILED
                return [
                    [self.pair_us(racer) * self.jitter(place, turn) for turn in range(request.rounds)]
                    for place, racer in enumerate(request.pairs)
                ]
            case Check():
                return sum(self.errors.get(config, 1e-3) for config in request.pair.values())


def chosen(gpu: TableGpu, shape: MoEShape = SHAPE) -> Measured:
    shortlist = [config for config in gpu.us if config != INCUMBENT]
    return measured.choose(shape, 64, shortlist, pair(INCUMBENT), gpu)


def test_the_fastest_right_pair_is_chosen() -> None:
    assert chosen(TableGpu({INCUMBENT: 10, SLOW: 12, FAST: 8, FASTER: 6})).pair == pair(FASTER)


@pytest.mark.parametrize("error", [0.5, float("nan"), float("inf")], ids=["wrong", "nan", "infinite"])
def test_a_fast_wrong_config_is_never_chosen(error: float) -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 8, FASTEST: 1}, errors={FASTEST: error})
    assert chosen(gpu).pair == pair(FAST)


def test_where_all_that_is_fast_is_wrong_the_incumbent_stays() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 8, FASTEST: 1}, errors={FAST: 0.5, FASTEST: 0.5})
    assert chosen(gpu).pair == pair(INCUMBENT)


def test_a_config_whose_check_fails_is_not_chosen() -> None:
    gpu = TableGpu({INCUMBENT: 10, FASTEST: 1})

    def fails_for_the_fastest(request: Screen | Race | Check) -> object:
        return FAILED if isinstance(request, Check) and request.pair == pair(FASTEST) else gpu(request)

    chosen = measured.choose(SHAPE, 64, [FASTEST], pair(INCUMBENT), fails_for_the_fastest)
    assert chosen is not None
    assert chosen.pair == pair(INCUMBENT)


@pytest.mark.parametrize("us", [10.0, 9.95, 12.0], ids=["as fast", "faster by less than 1 %", "slower"])
def test_the_incumbent_stays_unless_it_is_clearly_beaten(us: float) -> None:
    assert chosen(TableGpu({INCUMBENT: 10, FAST: us})).pair == pair(INCUMBENT)


def test_a_gain_of_two_percent_without_noise_is_taken() -> None:
    assert chosen(TableGpu({INCUMBENT: 10, FAST: 9.8})).pair == pair(FAST)


def test_a_gain_smaller_than_the_incumbents_own_noise_is_not_taken() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 9.5}, jitter=lambda place, _: 0.9 if place == 2 else 1.0)
    assert chosen(gpu).pair == pair(INCUMBENT)


def test_the_noise_is_how_much_the_incumbent_differs_from_itself() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 5}, jitter=lambda place, _: 1.25 if place == 2 else 1.0)
    assert chosen(gpu).noise == pytest.approx(0.2)


def test_a_gpu_that_slows_down_during_the_race_changes_no_verdict() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 9.5}, jitter=lambda _, turn: 1 + turn / 10)
    assert chosen(gpu).pair == pair(FAST)


def test_the_gain_is_how_many_times_faster_than_the_incumbent() -> None:
    assert chosen(TableGpu({INCUMBENT: 10, FAST: 8})).gain == pytest.approx(1.25)


def test_where_the_incumbent_stays_there_is_no_gain() -> None:
    assert chosen(TableGpu({INCUMBENT: 10, SLOW: 12})).gain == 1


def test_a_candidate_that_cannot_run_is_counted_and_left_out() -> None:
    found = chosen(TableGpu({INCUMBENT: 10, FAST: 8, FASTEST: 1}, fails=frozenset({FASTEST})))
    assert (found.pair, found.tried, found.failed) == (pair(FAST), 2, 1)


def test_where_no_candidate_can_run_the_incumbent_stays() -> None:
    found = chosen(TableGpu({INCUMBENT: 10, FAST: 8, FASTER: 6}, fails=frozenset({FAST, FASTER})))
    assert (found.pair, found.failed) == (pair(INCUMBENT), 2)


def test_an_empty_shortlist_leaves_the_incumbent() -> None:
    assert chosen(TableGpu({INCUMBENT: 10})).pair == pair(INCUMBENT)


def test_up_and_down_may_take_different_configs_of_one_block_m() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 2, FASTER: 8}, down_us={FAST: 8, FASTER: 2})
    assert chosen(gpu).pair == pair(FAST, FASTER)


def test_up_and_down_share_block_size_m_even_where_others_would_be_faster() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 1, OTHER_BLOCK_M: 9}, down_us={FAST: 9, OTHER_BLOCK_M: 1})
    found = chosen(gpu).pair
    assert found["up"].block_m == found["down"].block_m


def test_every_pair_that_races_shares_block_size_m() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 1, FASTER: 3, OTHER_BLOCK_M: 9}, down_us={FAST: 9, OTHER_BLOCK_M: 1})
    chosen(gpu)
    pairs = [racer for request in gpu.asked if isinstance(request, Race) for racer in request.pairs]
    assert {racer["up"].block_m - racer["down"].block_m for racer in pairs} == {0}


def test_the_incumbent_races_first_and_last() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 8})
    chosen(gpu)
    (race,) = (request for request in gpu.asked if isinstance(request, Race))
    assert (race.pairs[0], race.pairs[-1]) == (pair(INCUMBENT), pair(INCUMBENT))


def test_a_race_that_fails_as_a_whole_is_run_one_by_one() -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 8, FASTEST: 1}, fails_in_a_race=frozenset({FASTEST}))
    assert chosen(gpu).pair == pair(FAST)


def test_an_incumbent_that_cannot_run_loses_to_one_that_can() -> None:
    gpu = TableGpu({INCUMBENT: 10, SLOW: 12}, fails_in_a_race=frozenset({INCUMBENT}))
    assert chosen(gpu).pair == pair(SLOW)


@pytest.mark.parametrize(
    ("scheme", "winner"), [(None, INCUMBENT), ("fp8_w8a8", FAST), ("int8_w8a8", FAST)], ids=["bf16", "fp8", "int8"]
)
def test_an_error_of_two_percent_is_right_for_eight_bits_alone(scheme: Scheme | None, winner: TileConfig) -> None:
    gpu = TableGpu({INCUMBENT: 10, FAST: 8}, errors={FAST: 1e-2})
    assert chosen(gpu, MoEShape(8, 64, 64, 2, Quantisation(scheme))).pair == pair(winner)


def test_where_nothing_runs_nothing_is_chosen() -> None:
    shape = MoEShape(8, 64, 64, 2)
    config = TileConfig(16, 32, 64, 1, 4, 2)
    pair: Pair = {"up": config, "down": config}
    assert measured.choose(shape, 64, [config], pair, lambda request: Failure("OutOfMemoryError", "full")) is None
