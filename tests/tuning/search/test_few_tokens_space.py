"""The two launches for few tokens against the pair chosen for the engine: where they are raced, how, and who wins."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sglang_moe_ext.core import Failure, MoEShape, Quantization, TileConfig
from sglang_moe_ext.few_tokens_config import FewTokensConfig, refusals
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.kernel_plans import few_tokens_problem, list_jobs
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchLayers,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
    LayerTimes,
    Pair,
    Runner,
)
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.search import few_tokens_space
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice

BF16 = MoEShape(65, 1536, 2048, 5)
BLOCK = MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", (128, 128)))
PAIR: Pair = {"up": TileConfig(16, 64, 128, 1, 4, 4), "down": TileConfig(16, 64, 128, 1, 4, 3)}


def problem(shape: MoEShape = BF16, device: str = "H100") -> Problem:
    return Problem(shape, find_gpu(device), "sglang")


def raced(
    *, ours_us: float = 40.0, error: float = 2.4e-3, shape: MoEShape = BF16, does_compile: bool = True
) -> tuple[MeasuredChoice[Runner] | None, list[BenchRequest]]:
    """With the engine's layer at 50 us; what was asked of the GPU."""
    asked: list[BenchRequest] = []

    def measure(request: BenchRequest) -> BenchResult:
        asked.append(request)
        match request:
            case BenchLayers(_, runners, rounds):
                us = [ours_us if isinstance(it, FewTokensConfig) else 50.0 for it in runners]
                return LayerTimes(tuple((it,) * rounds for it in us), 1)
            case CheckAccuracy(_, runner):
                of_engine = 3.9e-3 if shape.quantization.scheme is None else 1.9e-2
                return Accuracy(error if isinstance(runner, FewTokensConfig) else of_engine)
        raise AssertionError(f"{request} is not about whole layers")

    def clean(plan: FewTokensConfig) -> Failure | None:
        return None if does_compile else Failure("CompilationError", "no such instruction")

    return few_tokens_space.compare_plans(problem(shape), 1, PAIR, measure, clean, rounds=8), asked


def test_two_launches_that_are_faster_win_and_are_timed_in_graphs_alone() -> None:
    found, asked = raced()
    assert found is not None
    assert isinstance(found.pair, FewTokensConfig)
    assert found.gain.value == pytest.approx(50 / 40)
    assert all(request.in_graph for request in asked if isinstance(request, BenchLayers))


def test_two_launches_that_are_as_fast_leave_the_layer_to_the_engine() -> None:
    found, _ = raced(ours_us=49.8)
    assert found is not None
    assert found.pair == PAIR


def test_two_launches_with_float8_weights_are_held_against_the_bound_of_16_bits() -> None:
    """What the engine's own layer may be wrong by, as it quantizes activations, is too much for one that does not."""
    right, _ = raced(shape=BLOCK)
    wrong, _ = raced(shape=BLOCK, error=1.9e-2)
    assert right is not None and isinstance(right.pair, FewTokensConfig)
    assert wrong is not None and wrong.pair == PAIR


def test_two_launches_that_do_not_compile_are_not_timed() -> None:
    found, asked = raced(does_compile=False)
    assert found is not None
    assert found.pair == PAIR
    assert found.failures == {"CompilationError": 2}
    assert not any(isinstance(it, FewTokensConfig) for one in asked if isinstance(one, BenchLayers) for it in one.pairs)


@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 16, 32])
def test_what_is_raced_is_allowed_by_the_rules_and_compiled_by_the_pool(tokens: int) -> None:
    plans = few_tokens_space.contenders(problem(), tokens)
    assert plans and not any(refusals(plan, few_tokens_problem(BF16, tokens)) for plan in plans)
    wanted = few_tokens_space.jobs(problem(), tokens)
    assert wanted == [job for plan in plans for job in list_jobs(plan, BF16, tokens, 90)]


def test_float8_weights_are_multiplied_in_the_range_of_the_activations() -> None:
    """So that an activation beyond 65504, which the engine's kernels carry, is not inf."""
    assert all(plan.wide_range for plan in few_tokens_space.contenders(problem(BLOCK), 1))
    assert not any(plan.wide_range for plan in few_tokens_space.contenders(problem(replace(BLOCK, dtype="float16")), 1))
    assert not any(plan.wide_range for plan in few_tokens_space.contenders(problem(), 1))


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        (BF16, 33),
        (BLOCK, 16),
        (replace(BF16, gated=False), 1),
        (replace(BF16, quantization=Quantization("int8_w8a8")), 1),
    ],
    ids=str,
)
def test_where_two_launches_never_won_or_cannot_run_none_is_raced(shape: MoEShape, tokens: int) -> None:
    assert few_tokens_space.contenders(problem(shape), tokens) == ()
