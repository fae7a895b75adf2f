"""Device code that finds each pair's sorted row, and sums a token's rows; `gather_sum.py` launches both."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["pairs"])  # type: ignore[untyped-decorator]
def inverse_kernel(  # type: ignore[no-untyped-def]
    sorted_token_ids_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    positions_ptr,
    pairs,
    BLOCK_SIZE_M: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < tl.load(num_tokens_post_padded_ptr)
    pair = tl.load(sorted_token_ids_ptr + row, mask=inside, other=pairs)
    inside &= pair < pairs
    expert = tl.load(expert_ids_ptr + row // BLOCK_SIZE_M, mask=inside, other=-1)
    tl.store(positions_ptr + pair, tl.where(expert >= 0, row, -1), mask=inside)


@triton.jit(do_not_specialize=["tokens", "rows"])  # type: ignore[untyped-decorator]
def gather_sum_kernel(  # type: ignore[no-untyped-def]
    rows_ptr,
    positions_ptr,
    routed_weights_ptr,
    out_ptr,
    tokens,
    rows,
    hidden,
    stride_row,
    stride_wt,
    stride_ws,
    stride_out,
    routed_scaling_factor,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there, wanted = token < tokens, column < hidden
    acc = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for slot in tl.static_range(SLOTS):
        position = tl.load(positions_ptr + token * SLOTS + slot, mask=there, other=-1)
        weight = tl.load(routed_weights_ptr + token * stride_wt + slot * stride_ws, mask=there, other=0.0)
        row_ptrs = rows_ptr + position.to(tl.int64)[:, None] * stride_row + column
        # Of a pair that the engine's sort left out, nobody wrote the position.
        is_row = (position >= 0) & (position < rows)
        row = tl.load(row_ptrs, mask=is_row[:, None] & wanted, other=0.0)
        acc += row.to(tl.float32) * weight.to(tl.float32)[:, None]
    sums = (acc * routed_scaling_factor).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token[:, None] * stride_out + column, sums, mask=there[:, None] & wanted)
