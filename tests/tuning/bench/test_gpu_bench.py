"""The results of the measuring process, on a stopwatch and a layer that are tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_moe_ext.core import CompileKey, TileConfig
from sglang_moe_ext.tuning.bench.clocks import ClockReading
from sglang_moe_ext.tuning.bench.gpu_bench import GpuBench
from sglang_moe_ext.tuning.bench.layer import ROUTINGS
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchGemm,
    BenchLayers,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
    GemmTimes,
)

KEY = CompileKey(16, 64, 64, 4, 3)
PAIR: Any = {"up": TileConfig(16, 64, 64, 1, 4, 3), "down": TileConfig(16, 64, 64, 1, 4, 3)}


@dataclass(frozen=True)
class Relaunch:
    """A launch that tells what it would have launched."""

    routing: int
    group: int = 0

    def with_argument(self, name: str, value: int) -> Relaunch:
        assert name == "GROUP_SIZE_M"
        return replace(self, group=value)

    def __call__(self) -> None:
        LAUNCHED.append((self.group, self.routing))


LAUNCHED: list[tuple[int, int]] = []


@pytest.fixture(autouse=True)
def nothing_launched() -> Iterator[None]:
    LAUNCHED.clear()
    yield


@dataclass
class TableStopwatch:
    """A launch takes `us` of its group, and a hundredth more with each routing."""

    us: dict[int, float] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)

    def rounds(
        self,
        launches: Sequence[Callable[[int], object]],
        turns: Sequence[int],
        meanwhile: Callable[[], None] | None = None,
    ) -> list[list[float]]:
        times = [[self._timed(launch, turn) for launch in launches] for turn in turns]
        self.events.append("queued")
        if meanwhile is not None:
            meanwhile()
        self.events.append("synchronized")
        return times

    def _timed(self, launch: Callable[[int], object], turn: int) -> float:
        launch(turn)
        if not LAUNCHED:
            return 0.0
        group, routing = LAUNCHED[-1]
        return self.us[group] + routing / 100


@dataclass
class FakeBatch:
    tokens: int
    seed: int
    has_gemms: bool = True

    def drop_gemms(self) -> None:
        self.has_gemms = False


class FakeLayer:
    """`errors`: of each routing. `batches`: all that were made."""

    def __init__(self, errors: Sequence[float] = (), makers: int = 1) -> None:
        self.source = SimpleNamespace(makers=(None,) * makers)
        self._errors = errors
        self.batches: list[FakeBatch] = []

    def batch(self, tokens: int, seed: int) -> FakeBatch:
        self.batches.append(FakeBatch(tokens, seed))
        return self.batches[-1]

    def error(self, batch: FakeBatch, turn: int, out: int, *, quantizes_activations: bool) -> float:
        self.quantizes_activations = quantizes_activations
        assert turn == out
        return self._errors[turn]


def bench(stopwatch: TableStopwatch | None = None, layer: FakeLayer | None = None) -> GpuBench:
    """One without an engine and a GPU."""
    one: Any = GpuBench.__new__(GpuBench)
    one._gemms = one._layers = stopwatch or TableStopwatch()
    one.layer, one._seed, one._batch, one._screens = layer or FakeLayer(), 100, None, 0
    one._relaunches = lambda batch, screen: [Relaunch(routing) for routing in range(ROUTINGS)]
    one._whole = lambda batch, pair: lambda turn: turn
    one._clocks = SimpleNamespace(read=lambda: None)
    return one  # type: ignore[no-any-return]


def screened(us: dict[int, float], limit_us: float | None, samples: int = 2) -> GemmTimes:
    return bench(TableStopwatch(us))._time_gemm(BenchGemm(64, "up", KEY, tuple(us), samples, limit_us))


def test_every_group_below_the_limit_gets_all_samples_with_routings_in_turn() -> None:
    found = screened({1: 10, 16: 11}, None, samples=6)
    assert found.us == ((10.0, 10.01, 10.02, 10.03, 10.0, 10.01), (11.0, 11.01, 11.02, 11.03, 11.0, 11.01))


def test_a_group_above_the_limit_hides_no_later_one() -> None:
    assert screened({1: 10, 16: 30, 32: 9, 64: 40}, 20).us == ((10.0, 10.01), (30.0,), (9.0, 9.01), (40.0,))


def test_a_first_group_above_the_limit_ends_the_screen() -> None:
    assert screened({1: 30, 16: 9}, 20).us == ((30.0,), ())
    assert LAUNCHED == [(1, 0)]


def test_one_sample_at_the_limit_is_not_above_it() -> None:
    assert screened({1: 20}, 20).us == ((20.0, 20.01),)


def test_one_sample_of_each_group_is_all_that_is_launched_where_one_is_asked_for() -> None:
    screened({1: 10, 16: 11}, None, samples=1)
    assert LAUNCHED == [(1, 0), (16, 0)]


def test_groups_take_turns_after_their_first_sample() -> None:
    screened({1: 10, 16: 11}, None, samples=3)
    assert LAUNCHED == [(1, 0), (16, 0), (1, 1), (16, 1), (1, 2), (16, 2)]


def seeds(*requests: BenchRequest) -> list[tuple[int, int]]:
    layer = FakeLayer()
    one = bench(TableStopwatch({1: 10}), layer)
    for request in requests:
        one._measure(request)
    return [(batch.tokens, batch.seed) for batch in layer.batches]


SCREEN = BenchGemm(64, "up", KEY, (1,), 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.usefixtures("no_gpu")
def test_a_screen_and_the_first_data_of_a_race_share_a_batch() -> None:
    assert seeds(SCREEN, SCREEN, BenchLayers(64, (PAIR,), 2), SCREEN) == [(64, 100)]


@pytest.mark.usefixtures("no_gpu")
def test_other_data_of_a_race_and_another_batch_size_are_other_batches() -> None:
    races = (
        BenchLayers(64, (PAIR,), 2, data=2),
        BenchLayers(64, (PAIR,), 2, attempt=1, data=2),
        BenchLayers(32, (PAIR,), 2, data=2),
    )
    assert seeds(SCREEN, *races, SCREEN) == [(64, 100), (64, 102), (32, 102), (64, 100)]


def test_a_race_has_no_tensors_of_single_gemms_beside_it() -> None:
    layer = FakeLayer()
    bench(layer=layer)._time_layers(BenchLayers(64, (PAIR,), 2))
    assert [batch.has_gemms for batch in layer.batches] == [False]


def test_clocks_are_read_while_the_gpu_is_busy() -> None:
    stopwatch = TableStopwatch()
    one: Any = bench(stopwatch)
    one._clocks = SimpleNamespace(read=lambda: stopwatch.events.append("clocks"))
    one._time_layers(BenchLayers(64, (PAIR,), 2))
    assert stopwatch.events == ["queued", "clocks", "synchronized"]


def test_a_race_tells_the_clock_and_what_spoiled_it() -> None:
    one: Any = bench()
    one._clocks = SimpleNamespace(read=lambda: ClockReading(1400, frozenset({"hardware slowdown", "idle"})))
    raced = one._time_layers(BenchLayers(64, (PAIR, PAIR), 3))
    assert (raced.sm_clock_mhz, raced.throttled) == (1400, "hardware slowdown")


@pytest.mark.parametrize(
    ("makers", "errors", "largest"),
    [(1, [0.1, 0.9], 0.1), (2, [0.1, 0.3, 0.9], 0.3), (2, [0.3, 0.1], 0.3), (9, [0.1, 0.1, 0.1, 0.4, 0.9], 0.4)],
    ids=["one kind", "the second kind", "the first kind", "more kinds than routings"],
)
def test_a_check_answers_the_largest_error_of_a_routing_of_each_kind(
    makers: int, errors: list[float], largest: float
) -> None:
    assert bench(layer=FakeLayer(errors, makers))._check(CheckAccuracy(64, PAIR)) == Accuracy(largest)


def test_a_check_runs_on_poisoned_memory() -> None:
    one: Any = bench(layer=FakeLayer([0.0]))
    made = []

    def run(turn: int) -> int:
        made.append(torch.empty(2))
        return turn

    one._whole = lambda batch, pair: run
    one._check(CheckAccuracy(64, PAIR))
    assert bool(made[0].isnan().all())


def failing(times: int) -> tuple[GpuBench, list[str]]:
    """A bench whose memory is too small for so many attempts, and what it did."""
    one: Any = bench()
    one._batch = FakeBatch(64, 100)
    did: list[str] = []

    def measure(request: BenchRequest) -> BenchResult:
        did.append("result with a batch" if one._batch else "result")
        if len([each for each in did if each.startswith("result")]) <= times:
            raise torch.cuda.OutOfMemoryError("no memory")
        return Accuracy(0.0)

    one._measure = measure
    return one, did


def test_a_question_for_which_memory_is_short_is_tried_again_with_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    one, did = failing(1)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: did.append("empty"))
    assert one.measure(CheckAccuracy(64, PAIR)) == Accuracy(0.0)
    assert did == ["result with a batch", "empty", "result"]


@pytest.mark.usefixtures("no_gpu")
def test_memory_that_is_short_twice_is_an_error() -> None:
    one, did = failing(2)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        one.measure(CheckAccuracy(64, PAIR))
    assert len(did) == 2


def test_a_gpu_that_answers_with_errors_is_not_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def illegal() -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", illegal)
    assert bench().is_well() is False


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_can_be_waited_for_is_well() -> None:
    assert bench().is_well() is True
