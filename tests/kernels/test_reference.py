"""reference.py against loops that share nothing with it."""

import pytest
import torch
from moe_problems import QUANTIZATIONS, naive_gemm, problem, routing

from sglang_moe_ext.core import MoEExtError, Quantization
from sglang_moe_ext.kernels.quantize import Scales, quantize_activations, quantize_weights, real_weights, to_fnuz
from sglang_moe_ext.kernels.reference import Alignment, grouped_gemm, moe_align, moe_layer, relative_error

ROUTES = ["spread", "one", "elsewhere", "nobody"]


def naive_align(ids: torch.Tensor, block_m: int, experts: int) -> tuple[list[int], list[int], int]:
    rows: list[int] = []
    owners: list[int] = []
    for expert in range(-1, experts):
        mine = [pair for pair, owner in enumerate(ids.flatten().tolist()) if owner == expert]
        while len(mine) % block_m:
            mine.append(ids.numel())
        rows += mine
        owners += [expert] * (len(mine) // block_m)
    return rows, owners, len(rows)


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("tokens", [1, 17, 64, 257])
@pytest.mark.parametrize("route", ROUTES)
def test_alignment_groups_pairs_by_expert_in_whole_blocks(route: str, tokens: int, block_m: int) -> None:
    ids = routing(route, tokens, experts=8, slots=3)
    rows, owners, total = naive_align(ids, block_m, experts=8)
    sorted_ids, expert_ids, post_padded = moe_align(ids, block_m, experts=8)
    assert post_padded.tolist() == [total]
    assert sorted_ids[:total].tolist() == rows
    assert sorted_ids[total:].eq(ids.numel()).all()
    assert expert_ids[: len(owners)].tolist() == owners
    assert expert_ids[len(owners) :].eq(-1).all()


def test_alignment_needs_no_value_on_the_host() -> None:
    alignment = moe_align(torch.empty(17, 4, dtype=torch.int32, device="meta"), 16, 64)
    assert {(part.device.type, part.dtype) for part in alignment} == {("meta", torch.int32)}


@pytest.mark.parametrize(("tokens", "rows"), [(1, 64), (17, 68 + 65 * 15 + 1)], ids=["few-pairs", "many-pairs"])
def test_alignment_buffers_are_as_long_as_the_engines(tokens: int, rows: int) -> None:
    alignment = moe_align(torch.zeros(tokens, 4, dtype=torch.int32), 16, 64)
    assert (alignment.sorted_token_ids.numel(), alignment.expert_ids.numel()) == (rows, -(-rows // 16))


@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_grouped_gemm_is_the_loop_over_pairs(kind: str, route: str, down: bool) -> None:
    case = problem(kind, 17, 40, 72, down=down, route=route)
    out = grouped_gemm(
        case.a,
        case.weights,
        case.topk_ids,
        top_k=case.top_k,
        scales=case.scales,
        routed_weights=case.topk_weights if down else None,
    )
    assert relative_error(out, naive_gemm(case, routed=down)) < 1e-6


@pytest.mark.parametrize("kind", ["fp8-block", "fp8-channel", "fp8-tensor", "int8-block", "int8-channel"])
def test_quantized_operands_stand_for_the_given_ones(kind: str) -> None:
    _, quantization = QUANTIZATIONS[kind]
    plain, quantized = problem("bf16", 17, 40, 72), problem(kind, 17, 40, 72)
    out = naive_gemm(quantized, routed=False)
    assert 1e-4 < relative_error(out, naive_gemm(plain, routed=False)) < 0.06, quantization


@pytest.mark.parametrize("scheme", ["fp8_w8a8", "int8_w8a8"])
def test_a_group_of_zeros_has_a_scale_that_divides(scheme: str) -> None:
    quantization = Quantization(scheme, (16, 32))  # type: ignore[arg-type]
    stored, scale = quantize_activations(torch.zeros(3, 72), quantization)
    assert scale.gt(0).all()
    assert stored.float().eq(0).all()


WEIGHT_ONLY = {
    "int4-group32": Quantization("int4_w4a16", (0, 32)),
    "int4-group64": Quantization("int4_w4a16", (0, 64)),
    "int8-group32": Quantization("int8_w8a16", (0, 32)),
    "int8-weights-per-channel": Quantization("int8_w8a16", per_channel=True),
}
"""Schemes whose activations stay in 16 bits."""
BOUND = {"int4_w4a16": 0.15, "int8_w8a16": 0.015}
"""Of the relative error of rounding normal values: a step of a seventh, or of a 127th, of about three deviations."""


@pytest.mark.parametrize("kind", WEIGHT_ONLY)
def test_weights_quantized_alone_stand_for_the_given_ones(kind: str) -> None:
    torch.manual_seed(0)
    quantization, weights = WEIGHT_ONLY[kind], torch.randn(3, 40, 96) * torch.tensor([1.0, 4.0, 0.1]).view(3, 1, 1)
    stored, scale = quantize_weights(weights, quantization)
    scales = Scales(quantization, None, scale)
    errors = [relative_error(real_weights(stored, expert, scales), weights[expert]) for expert in range(3)]
    assert all(1e-3 < error < BOUND[str(quantization.scheme)] for error in errors), errors


def test_an_int4_byte_holds_an_even_k_in_its_low_nibble_over_a_zero_point_of_8() -> None:
    row = torch.tensor([[[7.0, -7.0, 0.0, 1.0, -3.0, 2.0, 5.0, -6.0]]])
    stored, scale = quantize_weights(row, Quantization("int4_w4a16", (0, 8)))
    assert scale.tolist() == [[[1.0]]]
    assert stored.tolist() == [[[15 + 16 * 1, 8 + 16 * 9, 5 + 16 * 10, 13 + 16 * 2]]]


def test_int8_weights_in_groups_lie_over_a_zero_point_of_128() -> None:
    row = torch.tensor([[[127.0, -127.0, 0.0, 5.0]]])
    stored, _ = quantize_weights(row, Quantization("int8_w8a16", (0, 4)))
    assert (stored.dtype, stored.tolist()) == (torch.uint8, [[[255, 1, 128, 133]]])


def test_int8_weights_per_channel_have_no_zero_point() -> None:
    row = torch.tensor([[[127.0, -127.0, 0.0, 5.0]]])
    stored, _ = quantize_weights(row, Quantization("int8_w8a16", per_channel=True))
    assert (stored.dtype, stored.tolist()) == (torch.int8, [[[127, -127, 0, 5]]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_scales_of_groups_are_of_the_activations_dtype(dtype: torch.dtype) -> None:
    _, scale = quantize_weights(torch.randn(2, 8, 64).to(dtype), Quantization("int4_w4a16", (0, 32)))
    assert (scale.dtype, scale.shape) == (dtype, (2, 8, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", WEIGHT_ONLY)
def test_a_group_of_zero_weights_comes_back_as_zeros(kind: str, dtype: torch.dtype) -> None:
    stored, scale = quantize_weights(torch.zeros(1, 4, 64, dtype=dtype), WEIGHT_ONLY[kind])
    assert real_weights(stored, 0, Scales(WEIGHT_ONLY[kind], None, scale)).eq(0).all()


@pytest.mark.parametrize("kind", WEIGHT_ONLY)
def test_layouts_can_be_had_of_weights_without_storage(kind: str) -> None:
    """So a compilation without a GPU can ask for the layout that a launch will have."""
    ours, real = (quantize_weights(torch.zeros(2, 8, 64, device=on), WEIGHT_ONLY[kind]) for on in ("meta", "cpu"))
    assert [(part.shape, part.dtype) for part in ours] == [(part.shape, part.dtype) for part in real]


@pytest.mark.parametrize("kind", WEIGHT_ONLY)
def test_activations_that_stay_in_16_bits_are_not_quantized(kind: str) -> None:
    with pytest.raises(MoEExtError, match="16 bits"):
        quantize_activations(torch.zeros(3, 64), WEIGHT_ONLY[kind])


@pytest.mark.parametrize(
    ("quantization", "k"),
    [
        (Quantization(), 64),
        (Quantization("int4_w4a16"), 64),
        (Quantization("int4_w4a16", per_channel=True), 64),
        (Quantization("int4_w4a16", (128, 128)), 64),
        (Quantization("int4_w4a16", (0, 32)), 63),
        (Quantization("int4_w4a16", (0, 0)), 64),
        (Quantization("int8_w8a16"), 64),
        (Quantization("int8_w8a16", (128, 128)), 64),
        (Quantization("fp8_w8a8", (0, 128)), 64),
        (Quantization("int8_w8a8", (0, 128)), 64),
    ],
    ids=[
        "no scheme",
        "int4 per tensor",
        "int4 per channel",
        "int4 in blocks",
        "half a byte",
        "empty groups",
        "int8 weights per tensor",
        "int8 weights in blocks",
        "fp8 in groups",
        "int8 in groups",
    ],
)
def test_weights_that_no_kernel_of_the_engine_reads_are_refused(quantization: Quantization, k: int) -> None:
    with pytest.raises(MoEExtError, match="expected"):
        quantize_weights(torch.zeros(2, 8, k), quantization)


def naive_layer(
    x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, *, gated: bool
) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, experts in enumerate(ids.tolist()):
        for slot, expert in enumerate(experts):
            if expert == -1:
                continue
            inner = w1[expert].double() @ x[token].double()
            half = len(inner) // 2 if gated else len(inner)
            inner = inner[:half] / (1 + torch.exp(-inner[:half])) * (inner[half:] if gated else 1.0)
            out[token] += weight[token, slot].double() * (w2[expert].double() @ inner)
    return out


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("route", ROUTES)
def test_layer_is_the_loop_over_tokens_and_slots(route: str, gated: bool) -> None:
    torch.manual_seed(0)
    x, w1, w2 = torch.randn(17, 24), torch.randn(4, 40, 24), torch.randn(4, 24, 20 if gated else 40)
    ids, weight = routing(route, 17, experts=4, slots=2), torch.rand(17, 2)
    out = moe_layer(x, w1, w2, weight, ids, gated=gated)
    assert relative_error(out, naive_layer(x, w1, w2, weight, ids, gated=gated)) < 1e-6


@pytest.mark.parametrize("kind", ["fp8-block", "fp8-channel", "fp8-tensor", "int8-channel", *WEIGHT_ONLY])
def test_quantized_layer_is_near_the_plain_one(kind: str) -> None:
    torch.manual_seed(0)
    quantization = WEIGHT_ONLY[kind] if kind in WEIGHT_ONLY else QUANTIZATIONS[kind][1]
    x, w1, w2 = torch.randn(17, 72), torch.randn(4, 80, 72), torch.randn(4, 72, 40)
    ids, weight = routing("spread", 17, experts=4, slots=2), torch.rand(17, 2)
    (q1, s1), (q2, s2) = quantize_weights(w1, quantization), quantize_weights(w2, quantization)
    out = moe_layer(x, q1, q2, weight, ids, quantization=quantization, w1_scale=s1, w2_scale=s2)
    # Each of two GEMMs and a product of two of its columns add their share.
    bound = 0.08 if quantization.scheme not in BOUND else 2.5 * BOUND[str(quantization.scheme)]
    assert 1e-4 < relative_error(out, moe_layer(x, w1, w2, weight, ids)) < bound


def test_the_engines_leave_to_use_tf32_comes_back_after_the_reference() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        case = problem("bf16", 1, 8, 8)
        grouped_gemm(case.a, case.weights, case.topk_ids, top_k=case.top_k)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


BAD = float("nan"), float("inf"), float("-inf")


@pytest.mark.parametrize("value", BAD)
def test_one_value_that_is_not_finite_fails_however_large_the_rest(value: float) -> None:
    ref = torch.full((1000,), 1e6)
    out = ref.clone()
    out[500] = value
    assert relative_error(out, ref) == float("inf")


@pytest.mark.parametrize("value", BAD)
def test_a_reference_that_is_not_finite_passes_nothing(value: float) -> None:
    ref = torch.tensor([1.0, value])
    assert relative_error(ref.clone(), ref) == float("inf")


@pytest.mark.parametrize(
    ("out", "ref", "error"),
    [([3.0, 4.5], [3.0, 4.0], 0.1), ([0.0, 0.0], [0.0, 0.0], 0.0), ([0.0, 1e-9], [0.0, 0.0], float("inf"))],
    ids=["ratio", "both-zero", "only-reference-zero"],
)
def test_relative_error_is_a_ratio_of_norms(out: list[float], ref: list[float], error: float) -> None:
    assert relative_error(torch.tensor(out), torch.tensor(ref)) == pytest.approx(error)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(MoEExtError, match="shapes"):
        relative_error(torch.ones(2, 1), torch.ones(2, 2))


def test_alignment_unpacks_in_the_engines_order() -> None:
    assert Alignment._fields == ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")


def test_float8_of_amds_kind_has_the_same_values() -> None:
    every_bit_pattern = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(torch.float8_e4m3fn)
    stored = every_bit_pattern[every_bit_pattern.float().isfinite()]
    turned, scale = to_fnuz(stored, torch.ones(1))
    assert torch.equal(turned.float() * scale, stored.float())
