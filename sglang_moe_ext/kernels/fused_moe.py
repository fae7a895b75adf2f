"""Our plain fused-MoE GEMM, with the engine's tiles: to compile and to measure where no engine is installed.

One binary serves every batch size, number of experts and GROUP_SIZE_M; `fused_moe_signature.py` says which.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moe_ext.core import CompileKey, MoEExtError, Quantization, TileConfig
from sglang_moe_ext.kernels.quantize import Scales
from sglang_moe_ext.kernels.reference import Alignment

# These follow the batch and the configuration: specializing on them would make many binaries that differ in nothing.
UNSPECIALIZED = ("blocks_m", "num_pairs", "group_m")


@triton.jit(do_not_specialize=UNSPECIALIZED)  # type: ignore[untyped-decorator]
def fused_moe_kernel(  # type: ignore[no-untyped-def]
    a_ptr,
    b_ptr,
    c_ptr,
    a_scale_ptr,
    b_scale_ptr,
    routed_weights_ptr,
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    N,
    K,
    blocks_m,
    num_pairs,
    group_m,
    stride_am,
    stride_be,
    stride_bn,
    stride_cm,
    stride_asm,
    stride_ask,
    stride_bse,
    stride_bsn,
    stride_bsk,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    TOP_K: tl.constexpr,
    SCALING: tl.constexpr,
    GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
):
    block_m, block_n = _tile_of_program(blocks_m, tl.cdiv(N, BLOCK_SIZE_N), group_m)
    if block_m * BLOCK_SIZE_M >= tl.load(num_tokens_post_padded_ptr):
        return
    pairs = tl.load(sorted_token_ids_ptr + block_m * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)).to(tl.int64)
    is_pair = pairs < num_pairs
    rows = pairs // TOP_K
    expert = tl.load(expert_ids_ptr + block_m).to(tl.int64)
    columns = block_n * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N).to(tl.int64)
    if expert < 0:
        nothing = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), c_ptr.dtype.element_ty)
        tl.store(c_ptr + pairs[:, None] * stride_cm + columns, nothing, mask=is_pair[:, None] & (columns < N))
        return

    # Columns past the end read one that is there, and are not stored: no mask on b while K is even.
    b_columns = columns % N
    depth = tl.arange(0, BLOCK_SIZE_K)
    a_ptrs = a_ptr + rows[:, None] * stride_am + depth
    b_ptrs = b_ptr + expert * stride_be + b_columns * stride_bn + depth[:, None]
    if SCALING == "block":
        a_scale_ptrs = a_scale_ptr + rows * stride_asm
        if GROUP_N % BLOCK_SIZE_N == 0:
            b_group = block_n * BLOCK_SIZE_N // GROUP_N
        else:
            b_group = b_columns // GROUP_N
        b_scale_ptrs = b_scale_ptr + expert * stride_bse + b_group * stride_bsn

    exact: tl.constexpr = a_ptr.dtype.element_ty == tl.int8 and SCALING != "block"
    if SWAP_AB:
        acc = tl.zeros((BLOCK_SIZE_N, BLOCK_SIZE_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), tl.int32 if exact else tl.float32)
    for k in range(0, K, BLOCK_SIZE_K):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=is_pair[:, None], other=0.0)
            b = tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=is_pair[:, None] & (depth < K - k), other=0.0)
            b = tl.load(b_ptrs, mask=depth[:, None] < K - k, other=0.0)
        if SWAP_AB:
            a, b = b.T, a.T
        if SCALING == "block":
            a_scale = tl.load(a_scale_ptrs + k // GROUP_K * stride_ask, mask=is_pair, other=0.0)
            b_scale = tl.load(b_scale_ptrs + k // GROUP_K * stride_bsk)
            acc += tl.dot(a, b) * _tile_scale(a_scale, b_scale, GROUP_N % BLOCK_SIZE_N == 0, SWAP_AB)
        else:
            acc = tl.dot(a, b, acc, out_dtype=acc.dtype)
        a_ptrs += BLOCK_SIZE_K
        b_ptrs += BLOCK_SIZE_K
    if SWAP_AB:
        acc = acc.T

    if SCALING == "channel":
        a_scale = tl.load(a_scale_ptr + rows * stride_asm, mask=is_pair, other=0.0)
        b_scale = tl.load(b_scale_ptr + expert * stride_bse + b_columns * stride_bsn)
        acc = acc * (a_scale[:, None] * b_scale)
    elif SCALING == "tensor":
        acc = acc * (tl.load(a_scale_ptr) * tl.load(b_scale_ptr + expert))
    if routed_weights_ptr is not None:
        acc = acc * tl.load(routed_weights_ptr + pairs, mask=is_pair, other=0.0)[:, None]
    c_ptrs = c_ptr + pairs[:, None] * stride_cm + columns
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=is_pair[:, None] & (columns < N))


@triton.jit
def _tile_of_program(blocks_m, blocks_n, group_m):  # type: ignore[no-untyped-def]
    """Programs walk down group_m blocks of rows before the next block of columns: its weights are still in L2."""
    program = tl.program_id(0)
    first_m = program // (group_m * blocks_n) * group_m
    height = min(blocks_m - first_m, group_m)
    within = program % (group_m * blocks_n)
    return first_m + within % height, within // height


@triton.jit  # type: ignore[untyped-decorator]
def _tile_scale(a_scale, b_scale, one_b_scale: tl.constexpr, swap_ab: tl.constexpr):  # type: ignore[no-untyped-def]
    """Factor of a partial product: a column or a row of scales where b has one for the tile, else the full tile."""
    if one_b_scale:
        both = a_scale * b_scale
        return both[None, :] if swap_ab else both[:, None]
    elif swap_ab:
        return a_scale[None, :] * b_scale[:, None]
    else:
        return a_scale[:, None] * b_scale[None, :]


def fused_moe_gemm(
    a: Tensor,
    weights: Tensor,
    out: Tensor,
    alignment: Alignment,
    config: TileConfig,
    *,
    top_k: int,
    scales: Scales | None = None,
    routed_weights: Tensor | None = None,
) -> None:
    """Write every pair's row of `out` ([pairs, N] or [tokens, slots, N]), that of expert -1 with zeros; nothing waits.

    `alignment` is of blocks of config.block_m; `top_k` as in `reference.grouped_gemm`.
    Raises: MoEExtError where tiles, scales and alignment do not go together.
    """
    arguments = kernel_arguments(
        a,
        weights,
        out,
        alignment,
        config.compile_key,
        _sm(a.device),
        top_k=top_k,
        scales=scales,
        routed_weights=routed_weights,
    )
    grid = (arguments["blocks_m"] * -(-weights.shape[1] // config.block_n),)
    fused_moe_kernel[grid](
        **arguments, group_m=config.group_m, num_warps=config.num_warps, num_stages=config.num_stages
    )


def kernel_arguments(
    a: Tensor,
    weights: Tensor,
    out: Tensor,
    alignment: Alignment,
    key: CompileKey,
    sm: int,
    *,
    top_k: int,
    scales: Scales | None,
    routed_weights: Tensor | None,
) -> dict[str, Any]:
    """Every argument of the kernel but group_m, by name; no value of a tensor is read, so meta tensors do."""
    _, columns, k = weights.shape
    out = out.view(-1, columns)
    quantization = Quantization() if scales is None else scales.quantization
    group_n, group_k = quantization.block_shape or (0, 0)
    scaling = _scaling(quantization)
    a_scale, b_scale = (None, None) if scales is None else (scales.activations, scales.weights)
    _check(a, weights, alignment, key, group_k)
    _check_scales(a_scale, b_scale, scaling)
    return {
        "a_ptr": a,
        "b_ptr": weights,
        "c_ptr": out,
        "a_scale_ptr": a_scale,
        "b_scale_ptr": b_scale,
        "routed_weights_ptr": routed_weights,
        "sorted_token_ids_ptr": alignment.sorted_token_ids,
        "expert_ids_ptr": alignment.expert_ids,
        "num_tokens_post_padded_ptr": alignment.num_tokens_post_padded,
        "N": columns,
        "K": k,
        "blocks_m": alignment.expert_ids.numel(),
        "num_pairs": out.shape[0],
        "stride_am": a.stride(0),
        "stride_be": weights.stride(0),
        "stride_bn": weights.stride(1),
        "stride_cm": out.stride(0),
        **dict(zip(("stride_asm", "stride_ask"), _strides(a_scale, 2), strict=True)),
        **dict(zip(("stride_bse", "stride_bsn", "stride_bsk"), _strides(b_scale, 3), strict=True)),
        "BLOCK_SIZE_M": key.block_m,
        "BLOCK_SIZE_N": key.block_n,
        "BLOCK_SIZE_K": key.block_k,
        "TOP_K": top_k,
        "SCALING": scaling,
        "GROUP_N": group_n,
        "GROUP_K": group_k,
        "EVEN_K": k % key.block_k == 0,
        "SWAP_AB": swaps_operands(quantization, key, sm),
    }


def swaps_operands(quantization: Quantization, key: CompileKey, sm: int) -> bool:
    """Hopper's wgmma takes 64 rows at least: the engine gives it the weights as rows where the tokens are fewer."""
    return quantization.row.swaps_operands and sm == 90 and key.block_m < 64 <= key.block_n


def _scaling(quantization: Quantization) -> str:
    if quantization.scheme is None:
        return "none"
    if quantization.is_block_wise:
        return "block"
    return "channel" if quantization.per_channel else "tensor"


def _strides(scale: Tensor | None, dimensions: int) -> tuple[int, ...]:
    return scale.stride() if scale is not None and scale.ndim == dimensions else (0,) * dimensions


def _check(a: Tensor, weights: Tensor, alignment: Alignment, key: CompileKey, group_k: int) -> None:
    if key.use_tma:
        raise MoEExtError("fused_moe_kernel reads through pointers: leave USE_TMA out of the configuration")
    if group_k and group_k % key.block_k:
        raise MoEExtError(
            f"BLOCK_SIZE_K={key.block_k} spans more than one scale of {group_k} along K: take a divisor of {group_k}"
        )
    if a.stride(1) != 1 or weights.stride(2) != 1:
        raise MoEExtError("fused_moe_kernel needs K contiguous in `a` and in `weights`: call .contiguous()")
    blocks = -(-alignment.sorted_token_ids.numel() // key.block_m)
    if blocks != alignment.expert_ids.numel():
        raise MoEExtError(
            f"the alignment has {alignment.expert_ids.numel()} blocks, not the {blocks} of "
            f"BLOCK_SIZE_M={key.block_m}: align with the configuration's block_m"
        )


def _check_scales(a_scale: Tensor | None, b_scale: Tensor | None, scaling: str) -> None:
    if a_scale is None or b_scale is None:
        return
    expected = "[1] and [experts]" if scaling == "tensor" else "two and three dimensions"
    fits = (
        (a_scale.numel() == 1 and b_scale.ndim == 1) if scaling == "tensor" else (a_scale.ndim, b_scale.ndim) == (2, 3)
    )
    if not fits:
        raise MoEExtError(
            f"scales of shapes {tuple(a_scale.shape)} and {tuple(b_scale.shape)} are not per {scaling}: give {expected}"
        )


@lru_cache
def _sm(device: torch.device) -> int:
    """90 for Hopper; 0 where there is no GPU, as in Triton's interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
