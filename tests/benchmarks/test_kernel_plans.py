"""The race of kernel plans with the engine: what is raced, what is told, and what a plan that fails costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from benchmarks import kernel_plans, plan_report
from benchmarks.kernel_plans import LAYERS, KnownPairs, LayerRace
from benchmarks.plan_bench import OfLayer, StageTimes, TimeStages
from sglang_moe_ext.core import EngineError, Failure, TileConfig
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.kernel_plans import DownConfig, KernelPlan, UpConfig, WarpSpecializedUp
from sglang_moe_ext.tables import plan_table
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchKernelPlan,
    BenchLayers,
    CheckAccuracy,
    GemmTimes,
    LayerTimes,
    Pair,
    Runner,
)
from sglang_moe_ext.tuning.problem import Problem

SHIPPED: Pair = {"up": TileConfig(64, 128, 128, 1, 4, 3), "down": TileConfig(64, 128, 128, 1, 4, 3)}
TUNED: Pair = {"up": TileConfig(128, 128, 128, 8, 8, 3), "down": TileConfig(128, 128, 128, 8, 8, 3)}
SHAPE = LAYERS["Qwen3-30B-A3B fp8 block"]
BEST_TRITON = KernelPlan(UpConfig(128, 128, 128, 32, 8, 3, is_fused=False), DownConfig(128, 128, 128, 1, 8, 3, True, 2))


def us_of(runner: Runner) -> float:
    """The tuned pair takes 800 us; a plan in Triton 700, the best of them 600, a warp-specialized one 500."""
    if not isinstance(runner, KernelPlan):
        return 800.0 if runner == TUNED else 1000.0
    if runner.is_warp_specialized:
        if isinstance(runner.up, WarpSpecializedUp):
            return 500.0
        return 640.0 if runner.up == BEST_TRITON.up else 650.0
    return 600.0 if runner == BEST_TRITON else 700.0


@dataclass
class FakeGpu:
    fails: Callable[[Runner], bool] = lambda runner: False
    asked: list[object] = field(default_factory=list)

    def __call__(self, asked: OfLayer) -> object:
        assert asked.shape == SHAPE
        self.asked.append(asked.request)
        match asked.request:
            case BenchKernelPlan(_, plan, samples):
                return Failure("Timeout", "hung") if self.fails(plan) else GemmTimes(((us_of(plan),) * samples,))
            case BenchLayers(_, runners, rounds):
                return LayerTimes(tuple((us_of(runner),) * rounds for runner in runners), 4)
            case CheckAccuracy():
                return Accuracy(1e-2)
            case TimeStages():
                return StageTimes({"up": 300.0, "down": 150.0})
            case request:
                raise AssertionError(f"{request} is not asked here")


def race(gpu: FakeGpu) -> LayerRace:
    return LayerRace(Problem(SHAPE, find_gpu("H100"), "sglang"), gpu, lambda plan: None)


def test_the_fastest_of_each_kind_is_raced_with_the_fastest_pair() -> None:
    gpu = FakeGpu()
    row = race(gpu).run(4096, SHIPPED, [TUNED, SHIPPED], 8)
    assert row.tuned == TUNED
    assert (row.shipped_us, row.tuned_us) == (1000.0, 800.0)
    assert {kind: plan.us for kind, plan in row.plans.items()} == {"Triton": 600.0, "warp-specialized": 500.0}
    assert row.plans["warp-specialized"].gain.value == pytest.approx(1.6)
    assert row.best.plan.is_warp_specialized


def test_the_plan_in_triton_gets_every_down_gemm_that_a_warp_specialized_up_would_keep_from_it() -> None:
    gpu = FakeGpu()
    assert race(gpu).run(4096, SHIPPED, [TUNED], 8).plans["Triton"].plan == BEST_TRITON


def test_kernels_that_hang_leave_the_row_to_the_others() -> None:
    hangs = FakeGpu(fails=lambda runner: isinstance(runner, KernelPlan) and runner.is_warp_specialized)
    row = race(hangs).run(4096, SHIPPED, [TUNED], 8)
    assert list(row.plans) == ["Triton"]
    assert "| - |" in plan_report.cells(row)


def test_a_layer_without_any_plan_is_an_error_and_not_a_row() -> None:
    with pytest.raises(EngineError, match="none of our plans"):
        race(FakeGpu(fails=lambda runner: True)).run(4096, SHIPPED, [TUNED], 8)


def test_one_batch_size_that_fails_costs_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = KnownPairs({1024: SHIPPED}, [TUNED])
    rows = kernel_plans.race_layer("it", race(FakeGpu()), pairs, [512, 1024], 8)
    said = capsys.readouterr().out
    assert [row["m"] for row in rows] == [1024]
    assert "| 512 | KeyError" in said
    assert "Triton 1.333x, warp-specialized 1.600x, the fastest of all 1.600x, which is 2.000x" in said
    assert plan_table.parse_plan(json.loads(json.dumps(rows[0]))["plans"]["Triton"]["path"]) == BEST_TRITON


def test_every_line_of_the_table_has_as_many_cells_as_its_head() -> None:
    row = race(FakeGpu()).run(1024, SHIPPED, [TUNED], 8)
    first, second = plan_report.HEADER.splitlines()
    assert first.count("|") == second.count("|") == plan_report.cells(row).count("|")
