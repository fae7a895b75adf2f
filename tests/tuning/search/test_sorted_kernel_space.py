"""Our own plan against what was chosen of the engine's kernels: which are tried, and what it takes to win."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from sglang_moe_ext.core import Failure, MoEShape, Quantization, TileConfig
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.kernel_plans import (
    KernelPlan,
    ShortKDownConfig,
    UpConfig,
    WarpSpecializedDown,
    WarpSpecializedUp,
    list_jobs,
)
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
from sglang_moe_ext.tuning.search import sorted_kernel_space
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice
from sglang_moe_ext.tuning.search.sorted_kernel_space import CleanPlan

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
    gpu: FakeGpu,
    tokens: int = 4096,
    shape: MoEShape = SHAPE,
    clean: CleanPlan = lambda plan: None,
    device: str = "H200",
) -> MeasuredChoice[Runner] | None:
    return sorted_kernel_space.compare_plans(problem(shape, device), tokens, PAIR, [PAIR["up"]], gpu, clean, rounds=8)


def problem(shape: MoEShape = SHAPE, device: str = "H200") -> Problem:
    return Problem(shape, find_gpu(device), "sglang")


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
    assert replace(with_tma, use_tma=False) in sorted_kernel_space.up_configs(problem(), 4096, [with_tma])


@pytest.mark.parametrize(("columns", "is_tried"), [(512, True), (768, False)])
def test_rows_of_a_are_kept_only_where_they_are_short(columns: int, is_tried: bool) -> None:
    found = sorted_kernel_space.down_configs(problem(MoEShape(256, columns, 7168, 8, BLOCK)), 4096, 64)
    assert any(isinstance(config, ShortKDownConfig) for config in found) == is_tried


def test_a_plan_whose_binary_does_not_fit_is_never_launched() -> None:
    too_large = Failure("OutOfResources", "shared memory")
    gpu = FakeGpu()
    compared(gpu, clean=lambda plan: too_large if is_fused(plan) else None)
    assert gpu.screened() and not any(map(is_fused, gpu.screened()))


@pytest.mark.parametrize("quantization", [Quantization(), BLOCK, CHANNEL], ids=str)
def test_every_binary_that_a_screening_needs_is_known_before_it(quantization: Quantization) -> None:
    shape, gpu = replace(SHAPE, quantization=quantization), FakeGpu()
    wanted = sorted_kernel_space.screening_jobs(problem(shape), 4096, [PAIR["up"]])
    compared(gpu, shape=shape)
    assert {job for plan in gpu.screened() for job in list_jobs(plan, shape, 4096, 90)} <= set(wanted)


def test_where_no_plan_is_tried_nothing_is_compiled() -> None:
    assert sorted_kernel_space.screening_jobs(problem(), 1) == []


def in_gluon(gpu: FakeGpu) -> list[KernelPlan]:
    return [plan for plan in gpu.screened() if plan.is_warp_specialized]


@pytest.mark.parametrize("quantization", [Quantization(), BLOCK, CHANNEL], ids=str)
def test_warp_specialized_kernels_are_tried_with_each_other_and_with_ours_in_triton(quantization: Quantization) -> None:
    gpu = FakeGpu(us=lambda runner: 1.0 if isinstance(runner, KernelPlan) and runner.is_warp_specialized else PAIR_US)
    compared(gpu, shape=replace(SHAPE, quantization=quantization))
    kinds = {(type(plan.up).__name__, type(plan.down).__name__) for plan in in_gluon(gpu)}
    assert {("WarpSpecializedUp", "WarpSpecializedDown"), ("TileConfig", "WarpSpecializedDown")} <= kinds
    ups = {plan.up for plan in in_gluon(gpu) if isinstance(plan.up, WarpSpecializedUp)}
    assert len(ups) == 3


def test_a_warp_specialized_up_may_win_with_a_down_gemm_in_triton() -> None:
    def us(runner: Runner) -> float:
        is_mixed = isinstance(runner, KernelPlan) and isinstance(runner.up, WarpSpecializedUp)
        if not is_mixed:
            return PAIR_US
        return 0.8 * PAIR_US if isinstance(runner.down, WarpSpecializedDown) else 0.7 * PAIR_US

    found = compared(FakeGpu(us=us))
    assert found is not None
    assert isinstance(found.pair, KernelPlan)
    assert isinstance(found.pair.up, WarpSpecializedUp)
    assert not isinstance(found.pair.down, WarpSpecializedDown)


@pytest.mark.parametrize(("tokens", "shape"), [(511, replace(SHAPE, experts=8)), (128, replace(SHAPE, experts=8))])
def test_few_tokens_are_no_work_for_tiles_of_128_rows(tokens: int, shape: MoEShape) -> None:
    gpu = FakeGpu()
    compared(gpu, tokens, shape)
    assert gpu.screened() and not in_gluon(gpu)


def test_another_architecture_than_hopper_gets_no_warp_specialized_kernel() -> None:
    gpu = FakeGpu()
    compared(gpu, device="B200")
    assert gpu.screened() and not in_gluon(gpu)


@pytest.mark.parametrize("triton", ["3.5.1", "3.9.0", ""])
def test_a_triton_that_the_kernels_were_not_tested_with_gets_none(triton: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Problem, "triton", triton)
    gpu = FakeGpu()
    compared(gpu)
    assert gpu.screened() and not in_gluon(gpu)


def test_two_programs_a_multiprocessor_are_tried_for_block_wise_float8_alone() -> None:
    for quantization in (Quantization(), BLOCK, CHANNEL):
        gpu = FakeGpu()
        compared(gpu, shape=replace(SHAPE, quantization=quantization))
        forms = {plan.down.form for plan in in_gluon(gpu) if isinstance(plan.down, WarpSpecializedDown)}
        assert forms == ({"wide", "pair"} if quantization == BLOCK else {"wide"})


def test_a_gpu_on_which_gluon_fails_still_times_every_other_plan() -> None:
    gpu = FakeGpu(fails=lambda runner: isinstance(runner, KernelPlan) and runner.is_warp_specialized)
    compared(gpu)
    ran = [plan for plan in gpu.screened() if not plan.is_warp_specialized]
    without = FakeGpu()
    compared(without, device="B200")
    assert {plan.up for plan in ran} == {plan.up for plan in without.screened()}


def test_experts_of_other_ranks_leave_fewer_rows_to_each_expert_here() -> None:
    shape = replace(SHAPE, experts=32, ep=4)
    assert sorted_kernel_space.why_not(shape, 511) is not None
    assert sorted_kernel_space.why_not(shape, 512) is None
