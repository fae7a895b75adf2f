"""What the MoE GEMMs and the MoE layer mean, in plain torch and float32: every kernel is judged by this file.

A *pair* is one (token, slot) of `topk_ids`, numbered token * top_k + slot. Expert -1 is an expert of another rank: its
pairs count as zero. Nothing is rounded on the way, but for activations that the scheme itself quantizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from sglang_moe_ext.core import MoEExtError, Quantization
from sglang_moe_ext.kernels.quantize import Scales, as_the_gemm_reads, real_rows, real_weights

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu, "gelu": gelu, "relu2": lambda x: relu(x).square()}


class Alignment(NamedTuple):
    """Pairs grouped by expert, each group padded to whole blocks of block_m rows; all int32, on the device of the ids.

    `sorted_token_ids` holds pair numbers, and the number of pairs where a row is padding; `expert_ids` has one entry a
    block, -1 where nothing is to be multiplied; rows at and after `num_tokens_post_padded` [1] are not to be read.
    """

    sorted_token_ids: Tensor
    expert_ids: Tensor
    num_tokens_post_padded: Tensor


def moe_align(topk_ids: Tensor, block_m: int, experts: int) -> Alignment:
    """Pairs in the order in which the GEMMs take them; the pairs of expert -1 lead, in blocks of expert -1.

    Buffer sizes are the engine's (sglang 0.5.23), so they depend on shapes alone and nothing waits for a GPU. Within an
    expert the order is that of the pairs; the engine's own order there varies from run to run.
    """
    pairs = topk_ids.numel()
    rows = pairs * block_m if pairs < experts + 1 else pairs + (experts + 1) * (block_m - 1)
    rows = -(-rows // 4) * 4
    index = torch.arange(pairs, device=topk_ids.device)
    group, pair = torch.sort(topk_ids.flatten().long() + 1, stable=True)
    size = torch.zeros(experts + 1, dtype=torch.long, device=topk_ids.device).scatter_add_(
        0, group, torch.ones_like(group)
    )
    padded = (size + block_m - 1) // block_m * block_m
    padded_end = padded.cumsum(0)
    gap = (padded_end - padded) - (size.cumsum(0) - size)
    sorted_token_ids = torch.full((rows,), pairs, dtype=torch.int32, device=topk_ids.device)
    sorted_token_ids.scatter_(0, index + gap[group], pair.int())
    first_row = torch.arange(0, rows, block_m, device=topk_ids.device)
    owner = torch.searchsorted(padded_end, first_row, right=True)
    expert_ids = torch.where(owner <= experts, owner - 1, -1)
    return Alignment(sorted_token_ids, expert_ids.int(), padded_end[-1:].int())


def grouped_gemm(
    a: Tensor,
    weights: Tensor,
    topk_ids: Tensor,
    *,
    top_k: int,
    scales: Scales | None = None,
    routed_weights: Tensor | None = None,
) -> Tensor:
    """[pairs, N] float32: row pair // top_k of `a` [rows, K] times its expert's weights [N, K], transposed.

    `top_k` is topk_ids.shape[1] for up, where the slots of a token share its row, and 1 for down.
    """
    experts, columns, _ = weights.shape
    ids = topk_ids.flatten().long()
    pairs_by_expert = torch.argsort(ids, stable=True)
    sizes = torch.bincount(ids + 1, minlength=experts + 1).tolist()
    out = torch.zeros(ids.numel(), columns, dtype=torch.float32, device=a.device)
    with _true_float32():
        for expert, pairs in enumerate(torch.split(pairs_by_expert, sizes)[1:]):
            if pairs.numel():
                rows = real_rows(a, pairs // top_k, scales)
                out[pairs] = rows @ real_weights(weights, expert, scales).T
    return out if routed_weights is None else out * routed_weights.reshape(-1, 1)


def moe_layer(
    hidden: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    quantization: Quantization | None = None,
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    quantizes_activations: bool = True,
) -> Tensor:
    """[tokens, hidden_size] float32: up, activation, down, weighted sum over the slots.

    Gated: the activation of the first half of the up columns, times the second half. `quantizes_activations`: where
    the scheme does; else they stay as they are.
    """
    keeps = not quantizes_activations
    up = _layer_gemm(hidden, w1, topk_ids, topk_ids.shape[1], quantization, w1_scale, keeps_rows=keeps)
    act = ACTIVATIONS[activation]
    if gated:
        gate, linear = up.chunk(2, dim=-1)
        inner = act(gate) * linear
    else:
        inner = act(up)
    down = _layer_gemm(inner, w2, topk_ids, 1, quantization, w2_scale, keeps_rows=keeps)
    weighted = down.view(*topk_ids.shape, -1) * topk_weights.float().unsqueeze(-1)
    return weighted.sum(dim=1)


def relative_error(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref||; inf where either is not finite, and where ref is all zeros but out is not."""
    if out.shape != ref.shape:
        raise MoEExtError(
            f"relative_error: shapes {tuple(out.shape)} and {tuple(ref.shape)} differ; compare like with like"
        )
    difference = torch.linalg.vector_norm(out.float() - ref.float(), dtype=torch.float64).item()
    size = torch.linalg.vector_norm(ref.float(), dtype=torch.float64).item()
    if difference == 0.0:
        return 0.0
    error = difference / size if size else float("inf")
    return float("inf") if math.isnan(error) else error


def _layer_gemm(
    a: Tensor,
    weights: Tensor,
    topk_ids: Tensor,
    top_k: int,
    quantization: Quantization | None,
    scale: Tensor | None,
    *,
    keeps_rows: bool,
) -> Tensor:
    if quantization is None or scale is None:
        return grouped_gemm(a, weights, topk_ids, top_k=top_k)
    if keeps_rows:
        return grouped_gemm(a, weights, topk_ids, top_k=top_k, scales=Scales(quantization, None, scale))
    rows, scales = as_the_gemm_reads(a, scale, quantization)
    return grouped_gemm(rows, weights, topk_ids, top_k=top_k, scales=scales)


@contextmanager
def _true_float32() -> Iterator[None]:
    """An engine may have allowed TF32, whose 10 bits would be the reference's error."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def in_sorted_order(values: Tensor, alignment: Alignment, padding: float = 0.0) -> Tensor:
    """[pairs, ...] -> [rows, ...]; rows of padding hold `padding`."""
    pairs = values.shape[0]
    ids = alignment.sorted_token_ids.long()
    # Indexing is not implemented for float8 everywhere; its bytes are.
    stored = values.view(torch.uint8) if values.element_size() == 1 else values
    rows = stored[ids.clamp(max=pairs - 1)]
    nothing = torch.tensor(padding, device=values.device).to(values.dtype).view(stored.dtype)
    rows[ids >= pairs] = nothing
    return rows.view(values.dtype)


def down(a: Tensor, weights: Tensor, alignment: Alignment, align_block_m: int, scales: Scales | None = None) -> Tensor:
    """[rows, N] float32 of `a` [rows, K] in sorted order."""
    out = torch.zeros(a.shape[0], weights.shape[1], dtype=torch.float32, device=a.device)
    blocks = int(alignment.num_tokens_post_padded[0]) // align_block_m
    for block, expert in enumerate(alignment.expert_ids[:blocks].tolist()):
        if expert >= 0:
            rows = torch.arange(block * align_block_m, (block + 1) * align_block_m, device=a.device)
            out[rows] = real_rows(a, rows, scales) @ real_weights(weights, expert, scales).T
    return out


def pair_positions(alignment: Alignment, align_block_m: int, tokens: int, slots: int) -> Tensor:
    """int32 [tokens, slots]: the row of each pair, -1 where it has none that an expert of this rank fills."""
    ids = alignment.sorted_token_ids[: int(alignment.num_tokens_post_padded[0])].long()
    rows = torch.arange(ids.numel(), device=ids.device)
    here = (ids < tokens * slots) & (alignment.expert_ids[rows // align_block_m] >= 0)
    positions = torch.full((tokens * slots,), -1, dtype=torch.int32, device=ids.device)
    positions[ids[here]] = rows[here].int()
    return positions.view(tokens, slots)


def gather_sum(rows: Tensor, positions: Tensor, routed_weights: Tensor, routed_scaling_factor: float = 1.0) -> Tensor:
    """[tokens, hidden] float32, slot after slot."""
    sums = torch.zeros(positions.shape[0], rows.shape[1], dtype=torch.float32, device=rows.device)
    for slot in range(positions.shape[1]):
        at = positions[:, slot].long()
        row = torch.where((at >= 0)[:, None], rows[at.clamp(min=0)].float(), 0.0)
        sums += row * routed_weights[:, slot, None].float()
    return sums * routed_scaling_factor
