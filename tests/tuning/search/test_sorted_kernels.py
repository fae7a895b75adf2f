"""Our own plan against what was chosen of the engine's kernels: which are tried, and what it takes to win."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from sglang_moe_ext.core import Failure, MoEShape, Quantization, TileConfig
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.sorted_kernels import KernelPlan, ShortKDownConfig, UpConfig, list_jobs
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchKernelPlan,
    BenchLayers,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
    GemmTimes,
    LayerTimes,
    Pair,
    Runner,
)
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.search import sorted_kernels
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice
from sglang_moe_ext.tuning.search.sorted_kernels import CleanPlan

SHAPE = MoEShape(128, 768, 2048, 8)
BLOCK = Quantization("fp8_w8a8", (128, 128))
CHANNEL = Quantization("fp8_w8a8", per_channel=True)
PAIR: Pair = {"up": TileConfig(128, 256, 64, 1, 8, 4), "down": TileConfig(128, 256, 64, 1, 8, 4, use_tma=True)}
PAIR_US = 1000.0


def is_fused(plan: KernelPlan) -> bool:
    return isinstance(plan.up, UpConfig) and plan.up.is_fused


@dataclass
class FakeGpu:
    """A table of times and errors by runner, since which of them wins is what a test is about."""

    us: Callable[[Runner], float] = lambda runner: PAIR_US
    error: Callable[[Runner], float] = lambda runner: 1e-3
    fails: Callable[[Runner], bool] = lambda runner: False
    asked: list[BenchRequest] = field(default_factory=list)

    def __call__(self, request: BenchRequest) -> BenchResult:
        self.asked.append(request)
        match request:
            case BenchKernelPlan(_, plan, samples):
                if self.fails(plan):
                    return Failure("OutOfResources", "shared memory")
                return GemmTimes(((self.us(plan),) * samples,))
            case BenchLayers(_, runners, rounds):
                return LayerTimes(tuple((self.us(runner),) * rounds for runner in runners), 4)
            case CheckAccuracy(_, runner):
                return Accuracy(self.error(runner))
            case _:
                raise AssertionError(f"{request} is not about plans")

    def screened(self) -> list[KernelPlan]:
        return [request.plan for request in self.asked if isinstance(request, BenchKernelPlan)]


def compared(
    gpu: FakeGpu, tokens: int = 4096, shape: MoEShape = SHAPE, clean: CleanPlan = lambda plan: None
) -> MeasuredChoice[Runner] | None:
    return sorted_kernels.compare_plans(shape, tokens, PAIR, [], gpu, clean, rounds=8)


def faster(share: float) -> Callable[[Runner], float]:
    """Fused plans take that share of the pair's time, others as long as the pair."""
    return lambda runner: PAIR_US * (share if isinstance(runner, KernelPlan) and is_fused(runner) else 1.0)


def test_a_path_that_is_faster_wins() -> None:
    found = compared(FakeGpu(us=faster(0.9)))
    assert found is not None
    assert isinstance(found.pair, KernelPlan)
    assert is_fused(found.pair)
    assert found.gain.value == pytest.approx(1 / 0.9)


@pytest.mark.parametrize("share", [1.0, 0.995, 1.1], ids=["as fast", "by less than the noise", "slower"])
def test_the_pair_stays_where_no_path_is_faster_beyond_doubt(share: float) -> None:
    found = compared(FakeGpu(us=faster(share)))
    assert found is not None
    assert found.pair == PAIR


def test_a_fast_wrong_path_is_never_chosen() -> None:
    wrong = FakeGpu(us=faster(0.5), error=lambda runner: 0.3 if isinstance(runner, KernelPlan) else 1e-3)
    found = compared(wrong)
    assert found is not None
    assert found.pair == PAIR


def test_paths_that_cannot_run_are_counted_and_cost_nothing_else() -> None:
    found = compared(
        FakeGpu(us=faster(0.9), fails=lambda runner: isinstance(runner, KernelPlan) and runner.block_m == 64)
    )
    assert found is not None
    assert isinstance(found.pair, KernelPlan)
    assert found.pair.block_m == 128
    assert found.failures["OutOfResources"] > 0


def test_the_pair_stays_where_no_path_runs() -> None:
    found = compared(FakeGpu(fails=lambda runner: True))
    assert found is not None
    assert found.pair == PAIR


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        (replace(SHAPE, quantization=Quantization("fp8_w8a8")), 4096),
        (replace(SHAPE, quantization=Quantization("int8_w8a8", per_channel=True)), 4096),
        (replace(SHAPE, quantization=Quantization("fp8_w8a8", (64, 64))), 4096),
        (replace(SHAPE, quantization=Quantization("int4_w4a16", (0, 128))), 4096),
        (replace(SHAPE, gated=False), 4096),
        (replace(SHAPE, intermediate_size=96), 4096),
        (SHAPE, 511),
    ],
    ids=["per tensor", "int8", "small blocks", "int4", "not gated", "narrow", "few rows an expert"],
)
def test_where_our_kernels_cannot_or_need_not_run_nothing_is_asked(shape: MoEShape, tokens: int) -> None:
    gpu = FakeGpu()
    assert compared(gpu, tokens, shape) is None
    assert gpu.asked == []


@pytest.mark.parametrize("quantization", [Quantization(), BLOCK, CHANNEL], ids=str)
def test_few_paths_are_tried_since_each_is_compiled_where_it_is_measured(quantization: Quantization) -> None:
    gpu = FakeGpu()
    compared(gpu, shape=replace(SHAPE, quantization=quantization))
    paths = gpu.screened()
    assert len(paths) == len(set(paths)) <= 40


@pytest.mark.parametrize("quantization", [Quantization(), BLOCK, CHANNEL], ids=str)
def test_every_path_sorts_into_blocks_that_its_down_tiles_divide(quantization: Quantization) -> None:
    gpu = FakeGpu()
    compared(gpu, shape=replace(SHAPE, quantization=quantization))
    assert all(plan.block_m % plan.down.block_m == 0 for plan in gpu.screened())


def test_an_up_gemm_of_the_engine_is_tried_without_tma() -> None:
    with_tma = replace(PAIR["up"], use_tma=True)
    assert replace(with_tma, use_tma=False) in sorted_kernels.up_configs(SHAPE, [with_tma])


@pytest.mark.parametrize(("columns", "is_tried"), [(512, True), (768, False)])
def test_rows_of_a_are_kept_only_where_they_are_short(columns: int, is_tried: bool) -> None:
    found = sorted_kernels.down_configs(MoEShape(256, columns, 7168, 8, BLOCK), 64)
    assert any(isinstance(config, ShortKDownConfig) for config in found) == is_tried


def test_a_plan_whose_binary_does_not_fit_is_never_launched() -> None:
    too_large = Failure("OutOfResources", "shared memory")
    gpu = FakeGpu()
    compared(gpu, clean=lambda plan: too_large if is_fused(plan) else None)
    assert gpu.screened() and not any(map(is_fused, gpu.screened()))


@pytest.mark.parametrize("quantization", [Quantization(), BLOCK, CHANNEL], ids=str)
def test_every_binary_that_a_screening_needs_is_known_before_it(quantization: Quantization) -> None:
    shape, gpu = replace(SHAPE, quantization=quantization), FakeGpu()
    wanted = sorted_kernels.screening_jobs(Problem(shape, specs.find("H200"), "sglang"), 4096, [PAIR["up"]])
    compared(gpu, shape=shape)
    assert {job for plan in gpu.screened() for job in list_jobs(plan, shape, 4096, 90)} <= set(wanted)


def test_where_no_plan_is_tried_nothing_is_compiled() -> None:
    assert sorted_kernels.screening_jobs(Problem(SHAPE, specs.find("H200"), "sglang"), 1) == []
