"""Our fused-MoE kernel against `reference.grouped_gemm`, on poisoned outputs."""

import pytest
import torch
from moe_problems import QUANTIZATIONS, Problem, problem

from sglang_moe_ext.core import MoEExtError, Quantization, TileConfig
from sglang_moe_ext.kernels import fused_moe
from sglang_moe_ext.kernels.quantize import Scales
from sglang_moe_ext.kernels.reference import grouped_gemm, moe_align, relative_error

SMALL = TileConfig(block_m=16, block_n=16, block_k=32, group_m=1, num_warps=4, num_stages=2)
TALL = TileConfig(block_m=64, block_n=32, block_k=16, group_m=8, num_warps=4, num_stages=2)
TILE_OF_TOKENS = {1: SMALL, 17: SMALL, 64: TALL, 257: TALL}
# The rounding of the output alone is 1.8e-3 and 2e-4 of the norm (measured in the interpreter, 2026-11-21).
BOUND = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}


def run(case: Problem, config: TileConfig, dtype: torch.dtype, *, routed: bool) -> torch.Tensor:
    tokens, slots = case.topk_ids.shape
    out = torch.full((tokens, slots, case.weights.shape[1]), float("nan"), dtype=dtype)
    alignment = moe_align(case.topk_ids, config.block_m, case.weights.shape[0])
    weights = case.topk_weights if routed else None
    fused_moe.fused_moe_gemm(
        case.a, case.weights, out, alignment, config, top_k=case.top_k, scales=case.scales, routed_weights=weights
    )
    return out.flatten(0, 1)


def expected(case: Problem, *, routed: bool) -> torch.Tensor:
    weights = case.topk_weights if routed else None
    return grouped_gemm(
        case.a, case.weights, case.topk_ids, top_k=case.top_k, scales=case.scales, routed_weights=weights
    )


def check(kind: str, case: Problem, config: TileConfig, *, routed: bool = False) -> None:
    dtype, _ = QUANTIZATIONS[kind]
    out = run(case, config, dtype, routed=routed)
    assert relative_error(out, expected(case, routed=routed)) < BOUND[dtype]


@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
@pytest.mark.parametrize("tokens", TILE_OF_TOKENS)
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_sizes_that_are_not_round_are_right(kind: str, tokens: int, down: bool) -> None:
    check(kind, problem(kind, tokens, 40, 72, down=down), TILE_OF_TOKENS[tokens], routed=down)


@pytest.mark.parametrize("routed", [False, True], ids=["plain", "routed"])
@pytest.mark.parametrize("route", ["one", "elsewhere", "nobody"])
@pytest.mark.parametrize("kind", ["bf16", "fp8-block", "fp8-channel"])
def test_every_routing_is_right(kind: str, route: str, routed: bool) -> None:
    check(kind, problem(kind, 33, 40, 64, route=route), SMALL, routed=routed)


@pytest.mark.parametrize("group_m", [1, 2, 8, 64])
def test_the_order_of_programs_does_not_change_a_bit(group_m: int) -> None:
    case = problem("bf16", 64, 40, 64)
    config = TileConfig(16, 16, 32, group_m, 4, 2)
    assert torch.equal(run(case, config, torch.bfloat16, routed=False), run(case, SMALL, torch.bfloat16, routed=False))


@pytest.mark.parametrize(
    ("kind", "group_n"), [("fp8-block", 16), ("fp8-block", 64), ("fp8-channel", 0), ("fp8-tensor", 0)]
)
def test_swapped_operands_are_right(kind: str, group_n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_moe, "_sm", lambda device: 90)
    block = Quantization("fp8_w8a8", (group_n, 32))
    monkeypatch.setitem(QUANTIZATIONS, "fp8-block", (torch.bfloat16, block))
    check(kind, problem(kind, 17, 136, 72), TileConfig(16, 64, 32, 1, 4, 2), routed=True)


def test_a_tile_wider_than_the_scale_group_takes_a_scale_a_column() -> None:
    check("fp8-block", problem("fp8-block", 17, 40, 72), TileConfig(16, 32, 32, 1, 4, 2))


def test_a_scale_group_that_no_tile_divides_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUANTIZATIONS, "fp8-block", (torch.bfloat16, Quantization("fp8_w8a8", (24, 32))))
    check("fp8-block", problem("fp8-block", 17, 40, 72), SMALL)


def test_a_k_tile_over_several_scales_is_refused() -> None:
    with pytest.raises(MoEExtError, match="BLOCK_SIZE_K=64"):
        run(problem("fp8-block", 17, 40, 72), TileConfig(16, 16, 64, 1, 4, 2), torch.bfloat16, routed=False)


def test_an_alignment_of_other_blocks_is_refused() -> None:
    case = problem("bf16", 17, 40, 72)
    out = torch.empty(17, 2, 40, dtype=torch.bfloat16)
    with pytest.raises(MoEExtError, match="BLOCK_SIZE_M=16"):
        fused_moe.fused_moe_gemm(case.a, case.weights, out, moe_align(case.topk_ids, 64, 4), SMALL, top_k=2)


def test_scales_of_another_scheme_are_refused() -> None:
    case = problem("fp8-channel", 17, 40, 72)
    assert case.scales is not None
    wrong = Problem(
        case.a,
        case.weights,
        Scales(case.scales.quantization, case.scales.activations, case.scales.weights.squeeze(-1)),
        case.topk_ids,
        case.topk_weights,
        case.top_k,
    )
    with pytest.raises(MoEExtError, match="not per channel"):
        run(wrong, SMALL, torch.bfloat16, routed=False)
