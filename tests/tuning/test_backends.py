"""Backends side by side on a GPU that is a table: who is timed, over whom gains are, and why one is left out."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from sglang_moe_ext.core import Failure, MoEShape, TileConfig
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.kernel_plans import KernelPlan, WarpSpecializedDown, WarpSpecializedUp
from sglang_moe_ext.tuning import backends
from sglang_moe_ext.tuning.backends import BackendComparison, TimedBackend
from sglang_moe_ext.tuning.bench import messages
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchGemm,
    BenchLayers,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
    GemmTimes,
    LayerTimes,
    LibraryLayer,
    Pair,
    Runner,
)
from sglang_moe_ext.tuning.problem import Problem

PROBLEM = Problem(MoEShape(65, 1536, 2048, 5), find_gpu("H100"), "sglang")
TILE = TileConfig(64, 128, 64, 1, 4, 3)
PAIR: Pair = {"up": TILE, "down": TILE}
PLAN = KernelPlan(WarpSpecializedUp(), WarpSpecializedDown())
RUNNERS: dict[str, Runner | Failure] = {
    "tuned": PAIR,
    "ours": PLAN,
    "quack": LibraryLayer("quack"),
    "torch": LibraryLayer("torch"),
    "flashinfer": Failure("NoPlan", "not asked"),
}


@dataclass(slots=True)
class TableGpu:
    """By the name of a runner, microseconds and errors."""

    us: dict[str, float]
    errors: dict[str, float | Failure] = field(default_factory=dict)
    timed: list[tuple[str, ...]] = field(default_factory=list)

    def __call__(self, request: BenchRequest) -> BenchResult:
        match request:
            case CheckAccuracy(_, runner):
                error = self.errors.get(name_of(runner), 1e-3)
                return error if isinstance(error, Failure) else Accuracy(error)
            case BenchLayers(_, runners, rounds):
                names = tuple(map(name_of, runners))
                self.timed.append(names)
                return LayerTimes(tuple((self.us[name],) * rounds for name in names), 4)
            case BenchGemm(_, projection):
                return GemmTimes(((30.0 if projection == "up" else 20.0,),))
            case _:
                raise AssertionError(request)


def name_of(runner: Runner) -> str:
    return next(
        name
        for name, it in RUNNERS.items()
        if not isinstance(it, Failure) and messages.identity(it) == messages.identity(runner)
    )


def compared(gpu: TableGpu, against: backends.Against = lambda runner: None) -> BackendComparison:
    return backends.compare_all(PROBLEM, 1024, RUNNERS, against, gpu, rounds=8)


US = {"tuned": 100.0, "ours": 80.0, "quack": 90.0, "torch": 200.0}


def test_all_that_are_right_are_timed_in_one_run_over_the_first() -> None:
    gpu = TableGpu(US)
    found = compared(gpu)
    assert gpu.timed == [("tuned", "ours", "quack", "torch", "tuned")]
    gains = {name: it.gain.value for name, it in found.results.items() if isinstance(it, TimedBackend) and it.gain}
    assert gains == pytest.approx({"tuned": 1.0, "ours": 1.25, "quack": 100 / 90, "torch": 0.5})
    assert found.results["flashinfer"] == RUNNERS["flashinfer"]
    assert list(found.results) == list(RUNNERS)


def test_only_the_engines_kernel_has_times_of_its_gemms() -> None:
    found = compared(TableGpu(US)).results
    gemms = {name: dict(it.gemm_us) for name, it in found.items() if isinstance(it, TimedBackend)}
    assert gemms == {"tuned": {"up": 30.0, "down": 20.0}, "ours": {}, "quack": {}, "torch": {}}


def test_what_is_wrong_is_never_timed_and_says_its_error() -> None:
    gpu = TableGpu(US, {"quack": 0.5, "torch": Failure("EngineError", "torch cannot be imported")})
    found = compared(gpu)
    assert gpu.timed == [("tuned", "ours", "tuned")]
    assert found.results["quack"] == Failure("Wrong", "its error against float32 is 5.0e-01")
    assert found.results["torch"] == Failure("EngineError", "torch cannot be imported")


def test_where_the_first_cannot_run_gains_are_over_the_next() -> None:
    misfit = Failure("OutOfResources", "shared memory")
    found = compared(TableGpu(US), lambda runner: misfit if runner == PAIR else None)
    assert found.results["tuned"] == misfit
    gains = {name: it.gain.value for name, it in found.results.items() if isinstance(it, TimedBackend) and it.gain}
    assert gains == pytest.approx({"ours": 1.0, "quack": 80 / 90, "torch": 0.4})


def test_a_layer_for_which_no_plan_is_known_says_how_one_is_found() -> None:
    assert "`tune` finds one" in getattr(backends.plans_at({}, 64), "message", "")


def test_given_configurations_are_raced_with_tma_as_well_where_it_works() -> None:
    given = {"given": {64: PAIR}}
    both = backends.with_and_without_tma(given, ("down",))
    assert list(both) == ["given", "given, TMA"]
    assert [config.use_tma for config in both["given, TMA"][64].values()] == [False, True]
    assert backends.with_and_without_tma(given, ()) == given
