"""Device code of the down projection where K is short: a program keeps its rows of A and streams the columns of B.

With a K of 2 to 8 steps a tile is over before its pipeline has filled; here the pipeline runs along N instead, and A is
read once. `short_down.py` launches it, and says what it computes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_moe_ext.kernels.sorted_down_kernel import scaled


@triton.jit(do_not_specialize=("tiles_per_program",))  # type: ignore[untyped-decorator]
def short_down_kernel(  # type: ignore[no-untyped-def]
    a_desc,
    b_desc,
    c_desc,
    a_scale_ptr,
    b_scale_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    N,
    tiles_per_program,
    stride_asm,
    stride_ask,
    stride_bse,
    stride_bsn,
    stride_bsk,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    STEPS: tl.constexpr,
    TILES_PER_BLOCK: tl.constexpr,
    SCALING: tl.constexpr,
    GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_SIZE_M
    if row >= tl.load(num_tokens_post_padded_ptr):
        return
    expert = tl.load(expert_ids_ptr + tl.program_id(0) // TILES_PER_BLOCK)
    if expert < 0:
        return
    if SCALING != "none":
        b_scale_ptr += expert.to(tl.int64) * stride_bse
    a_scale_ptrs = a_scale_ptr
    if SCALING == "block":
        a_scale_ptrs += (row + tl.arange(0, BLOCK_SIZE_M)).to(tl.int64) * stride_asm
    a = ()
    a_scale = ()
    for step in tl.static_range(STEPS):
        a += (a_desc.load([row, step * BLOCK_SIZE_K]),)  # type: ignore[assignment]
        if SCALING == "block":
            a_scale += (tl.load(a_scale_ptrs + step * BLOCK_SIZE_K // GROUP_K * stride_ask),)  # type: ignore[assignment]

    first = tl.program_id(1) * tiles_per_program
    last = min(first + tiles_per_program, tl.cdiv(N, BLOCK_SIZE_N))
    for tile in tl.range(first, last):
        column = tile * BLOCK_SIZE_N
        acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), tl.float32)
        for step in tl.static_range(STEPS):
            b = b_desc.load([expert, column, step * BLOCK_SIZE_K]).reshape(BLOCK_SIZE_N, BLOCK_SIZE_K)
            if SCALING == "block":
                at = column // GROUP_N * stride_bsn + step * BLOCK_SIZE_K // GROUP_K * stride_bsk
                acc += tl.dot(a[step], b.T) * (a_scale[step] * tl.load(b_scale_ptr + at))[:, None]
            else:
                acc = tl.dot(a[step], b.T, acc)
        acc = scaled(acc, a_scale_ptr, b_scale_ptr, row, column, N, stride_asm, stride_bsn, SCALING)
        c_desc.store([row, column], acc.to(c_desc.dtype))
