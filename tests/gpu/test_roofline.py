"""The floor below every measurement: bytes and arithmetic that no configuration can save."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sglang_moe_ext.core import MoEShape, Quantization
from sglang_moe_ext.gpu import roofline
from sglang_moe_ext.gpu.names import find_gpu

H200 = find_gpu("H200")
QWEN = MoEShape(128, 768, 2048, 8)
GLM = MoEShape(65, 1536, 2048, 5, fused_shared=1)

shapes = st.builds(
    MoEShape,
    experts=st.integers(8, 256),
    intermediate_size=st.just(768),
    hidden_size=st.just(2048),
    top_k=st.integers(2, 8),
    fused_shared=st.integers(0, 1),
    ep=st.sampled_from([1, 2, 8]),
)
token_counts = st.integers(1, 16384)


@given(shapes, token_counts)
def test_the_rows_are_those_of_the_routed_and_of_the_shared_experts(shape: MoEShape, tokens: int) -> None:
    load = roofline.load(shape, tokens)
    routed = (shape.experts - shape.fused_shared) * load.routed
    assert load.rows == pytest.approx(routed + tokens * shape.fused_shared)


@given(shapes, token_counts)
def test_no_more_experts_are_active_than_there_are(shape: MoEShape, tokens: int) -> None:
    assert shape.fused_shared <= roofline.load(shape, tokens).active_experts <= shape.experts


def test_one_token_activates_its_top_k_experts() -> None:
    assert roofline.load(QWEN, 1).active_experts == pytest.approx(8)


def test_one_token_activates_its_routed_experts_and_the_shared_one() -> None:
    assert roofline.load(GLM, 1).active_experts == pytest.approx(5)


def test_an_eighth_of_the_rows_stays_on_each_of_eight_ranks() -> None:
    assert roofline.load(MoEShape(16, 768, 2048, 8, ep=8), 64).rows == 64


@given(shapes, token_counts, st.sampled_from(["up", "down"]))
def test_the_floor_never_falls_as_tokens_are_added(shape: MoEShape, tokens: int, projection: str) -> None:
    fewer, more = (roofline.gemm_floor(shape, H200, m, projection).us for m in (tokens, tokens + 1))  # type: ignore[arg-type]
    assert fewer <= more


def test_the_floor_of_one_token_is_its_weights_over_the_bandwidth() -> None:
    weight_bytes = 8 * 2 * 768 * 2048 * 2
    floor = roofline.gemm_floor(QWEN, H200, 1, "up")
    assert floor.us == pytest.approx(weight_bytes / H200.bandwidth_gbs * 1e-3, rel=0.01)


def test_the_floor_of_many_tokens_is_their_arithmetic_over_the_rate() -> None:
    flops = 2 * 65536 * 8 * (2 * 768) * 2048
    assert roofline.gemm_floor(QWEN, H200, 65536, "up").us == pytest.approx(flops / H200.bf16_tflops * 1e-6)


def test_half_the_weight_bits_are_half_the_floor_of_one_token() -> None:
    fp8 = MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", (128, 128)))
    ratio = roofline.gemm_floor(fp8, H200, 1, "up").us / roofline.gemm_floor(QWEN, H200, 1, "up").us
    assert ratio == pytest.approx(0.5, rel=0.01)


def test_the_pair_is_the_sum_of_both_gemms() -> None:
    both = sum(roofline.gemm_floor(QWEN, H200, 64, projection).us for projection in ("up", "down"))  # type: ignore[arg-type]
    assert roofline.pair_floor_us(QWEN, H200, 64) == both


@given(st.floats(0.01, 200), st.sampled_from([16, 32, 64, 128, 256]))
def test_the_expected_blocks_are_those_of_a_poisson_count(mean_rows: float, block_m: int) -> None:
    exact = math.fsum(
        math.exp(rows * math.log(mean_rows) - mean_rows - math.lgamma(rows + 1)) * -(-rows // block_m)
        for rows in range(1, 600)
    )
    assert roofline.expected_blocks(mean_rows, block_m) == pytest.approx(exact, rel=1e-6)


@given(st.floats(0.01, 1e5), st.floats(1.001, 1.5), st.sampled_from([16, 64, 256]))
def test_more_rows_never_need_fewer_blocks(mean_rows: float, factor: float, block_m: int) -> None:
    assume(mean_rows * (factor - 1) > 1)
    more = roofline.expected_blocks(mean_rows * factor, block_m)
    assert roofline.expected_blocks(mean_rows, block_m) <= more * (1 + 1e-9)  # a sum that is cut off at 9 sigma


@given(st.floats(0.01, 1e5), st.sampled_from([16, 64, 256]))
def test_padding_costs_less_than_one_block_an_expert(mean_rows: float, block_m: int) -> None:
    assert mean_rows / block_m <= roofline.expected_blocks(mean_rows, block_m) * (1 + 1e-9) <= mean_rows / block_m + 1


def test_no_rows_need_no_blocks() -> None:
    assert roofline.expected_blocks(0, 64) == 0
