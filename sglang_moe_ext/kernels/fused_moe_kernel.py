"""Device code of our plain fused-MoE GEMM; `fused_moe.py` launches it, and `reference.grouped_gemm` is its meaning.

sglang 0.5.23's fused_moe_kernel was read for the tiles, the order of the programs and the swap of operands.
"""

from __future__ import annotations

import triton
import triton.language as tl

# These follow the batch and the configuration: specialising on them would make many binaries that differ in nothing.
UNSPECIALISED = ("blocks_m", "num_pairs", "group_m")


@triton.jit(do_not_specialize=UNSPECIALISED)  # type: ignore[untyped-decorator]
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
