"""Small MoE problems with a known answer: operands, routings, and the answer by an independent loop in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_moe_ext.core import Quantization
from sglang_moe_ext.kernels.quantize import Scales, quantize_activations, quantize_weights

QUANTIZATIONS = {
    "bf16": (torch.bfloat16, Quantization()),
    "fp16": (torch.float16, Quantization()),
    "fp8-block": (torch.bfloat16, Quantization("fp8_w8a8", (16, 32))),
    "fp8-channel": (torch.bfloat16, Quantization("fp8_w8a8", per_channel=True)),
    "fp8-tensor": (torch.bfloat16, Quantization("fp8_w8a8")),
    "int8-block": (torch.bfloat16, Quantization("int8_w8a8", (16, 32))),
    "int8-channel": (torch.bfloat16, Quantization("int8_w8a8", per_channel=True)),
}


@dataclass(frozen=True)
class Problem:
    """One grouped GEMM. `a` has one row a token for up, one a pair for down."""

    a: Tensor
    weights: Tensor
    scales: Scales | None
    topk_ids: Tensor
    topk_weights: Tensor
    top_k: int


def routing(name: str, tokens: int, experts: int, slots: int) -> Tensor:
    """int32 [tokens, slots]. Expert 1 of "spread" gets nothing; "elsewhere" is a rank that holds half the experts."""
    scores = torch.rand(tokens, experts)
    if name == "spread":
        scores[:, 1] = -1.0
    ids = scores.topk(slots, dim=1).indices.int()
    if name == "one":
        return torch.full_like(ids, 2)
    if name == "elsewhere":
        return torch.where(ids < experts // 2, ids, -1)
    if name == "nobody":
        return torch.full_like(ids, -1)
    return ids


def problem(
    kind: str,
    tokens: int,
    columns: int,
    k: int,
    *,
    down: bool = False,
    route: str = "spread",
    experts: int = 4,
    slots: int = 2,
) -> Problem:
    torch.manual_seed(tokens * 1000 + columns + k)
    dtype, quantization = QUANTIZATIONS[kind]
    # Experts of different size: one expert's scale taken for another's shows.
    size = torch.arange(1, experts + 1).view(-1, 1, 1) / 4
    a = torch.randn(tokens * (slots if down else 1), k).to(dtype)
    weights = (torch.randn(experts, columns, k) * size).to(dtype)
    scales = None
    if quantization.scheme is not None:
        a, a_scale = quantize_activations(a, quantization)
        weights, b_scale = quantize_weights(weights, quantization)
        scales = Scales(quantization, a_scale, b_scale)
    ids = routing(route, tokens, experts, slots)
    return Problem(a, weights, scales, ids, torch.rand(tokens, slots), 1 if down else slots)


def naive_gemm(case: Problem, *, routed: bool) -> Tensor:
    """[pairs, N] float64, element by element of the ids; scales are looked up by index arithmetic of its own."""
    _, columns, k = case.weights.shape
    out = torch.zeros(case.topk_ids.numel(), columns, dtype=torch.float64)
    for pair, expert in enumerate(case.topk_ids.flatten().tolist()):
        if expert == -1:
            continue
        row = pair // case.top_k
        real_row, real_weight = case.a[row].double(), case.weights[expert].double()
        if case.scales is not None:
            quantization = case.scales.quantization
            a_scale, b_scale = case.scales.activations.double(), case.scales.weights.double()
            match quantization.block_shape:
                case (n, d):
                    in_k, in_n = torch.arange(k) // d, torch.arange(columns) // n
                    real_row = real_row * a_scale[row][in_k]
                    real_weight = real_weight * b_scale[expert][in_n][:, in_k]
                case None if quantization.per_channel:
                    real_row, real_weight = real_row * a_scale[row, 0], real_weight * b_scale[expert]
                case None:
                    real_row, real_weight = real_row * a_scale[0], real_weight * b_scale[expert]
        out[pair] = real_weight @ real_row
        if routed:
            out[pair] *= case.topk_weights.flatten()[pair].item()
    return out
