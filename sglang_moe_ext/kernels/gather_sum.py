"""Weighted sum of each token's expert rows, gathered from the sorted order. Reference: `reference.gather_sum`.

Replaces a scattered store and a separate sum. The sum is in float32, slot by slot, so equal rows give equal bits on
every run. Launches do not synchronize.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.kernels import dependent_launch
from sglang_moe_ext.kernels.dependent_launch import wait_for_last
from sglang_moe_ext.kernels.launcher import launch


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
    DEPENDENT: tl.constexpr,
):
    wait_for_last(DEPENDENT)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there, wanted = token < tokens, column < hidden
    acc = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for slot in tl.static_range(SLOTS):
        position = tl.load(positions_ptr + token * SLOTS + slot, mask=there, other=-1)
        weight = tl.load(routed_weights_ptr + token * stride_wt + slot * stride_ws, mask=there, other=0.0)
        row_ptrs = rows_ptr + position.to(tl.int64)[:, None] * stride_row + column
        # The engine's sort can leave a pair out; its position is then undefined.
        is_row = (position >= 0) & (position < rows)
        row = tl.load(row_ptrs, mask=is_row[:, None] & wanted, other=0.0)
        acc += row.to(tl.float32) * weight.to(tl.float32)[:, None]
    sums = (acc * routed_scaling_factor).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token[:, None] * stride_out + column, sums, mask=there[:, None] & wanted)


ROWS_PER_PROGRAM = 256
FEW_TOKENS = 256
"""Up to this many tokens, wide chunks would leave multiprocessors idle."""
COLUMNS_PER_THREAD = 8
"""16-bit columns of one 16-byte load."""


@dataclass(frozen=True, slots=True)
class GatherConfig:
    """Tokens and columns that one program sums."""

    tokens: int
    columns: int
    num_warps: int


def gather_config(tokens: int, hidden: int) -> GatherConfig:
    """Chunks that divide the hidden size; several tokens a program for short rows, narrow chunks for few tokens."""
    widest = 256 if tokens <= FEW_TOKENS else 1024
    columns = next((width for width in (1024, 512, 256) if width <= widest and hidden % width == 0), 0)
    columns = columns or min(triton.next_power_of_2(hidden), widest)
    together = max(1, widest // columns) if columns >= hidden else 1
    return GatherConfig(together, columns, max(1, together * columns // (32 * COLUMNS_PER_THREAD)))


def launch_inverse(
    sorted_token_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    positions: Tensor,
    *,
    align_block_m: int,
    experts_elsewhere: bool = False,
) -> None:
    """Write the sorted row of each pair into `positions`.

    Args:
        positions: int32 [tokens, slots]; -1 where the expert belongs to another rank.
        align_block_m: rows of a block of the sort.
        experts_elsewhere: required under expert parallelism, where some of the engine's alignments leave pairs out of
            sorted_token_ids.
    """
    if experts_elsewhere:
        positions.fill_(-1)
    arguments = {
        "sorted_token_ids_ptr": sorted_token_ids,
        "expert_ids_ptr": expert_ids,
        "num_tokens_post_padded_ptr": num_tokens_post_padded,
        "positions_ptr": positions,
        "pairs": positions.numel(),
        "BLOCK_SIZE_M": align_block_m,
        "ROWS": ROWS_PER_PROGRAM,
        "num_warps": ROWS_PER_PROGRAM // 32,
    }
    launch(inverse_kernel, (triton.cdiv(sorted_token_ids.numel(), ROWS_PER_PROGRAM),), arguments)


def launch_gather_sum(
    rows: Tensor,
    positions: Tensor,
    routed_weights: Tensor,
    out: Tensor,
    *,
    routed_scaling_factor: float = 1.0,
    config: GatherConfig | None = None,
) -> None:
    """Write out[token] = sum over slots of rows[positions[token, slot]] * routed_weights[token, slot].

    Args:
        rows: [rows, hidden], sorted by expert.
        positions: int32 [tokens, slots], contiguous.
        routed_weights: [tokens, slots].
        out: [tokens, hidden].

    Raises:
        MoEExtError: the shapes do not fit together.
    """
    tokens, hidden = positions.shape[0], rows.shape[1]
    if out.shape != (tokens, hidden) or routed_weights.shape != positions.shape or not positions.is_contiguous():
        raise MoEExtError(
            f"shapes rows {tuple(rows.shape)}, positions {tuple(positions.shape)}, routed_weights "
            f"{tuple(routed_weights.shape)}, out {tuple(out.shape)} do not go together: expected [rows, hidden], "
            "[tokens, slots] twice, contiguous, and [tokens, hidden]"
        )
    if rows.stride(1) != 1 or out.stride(1) != 1:
        raise MoEExtError("gather_sum needs the columns of `rows` and of `out` contiguous: call .contiguous()")
    if not tokens:
        return
    config = config or gather_config(tokens, hidden)
    grid = (triton.cdiv(tokens, config.tokens), triton.cdiv(hidden, config.columns))
    launch(gather_sum_kernel, grid, sum_arguments(rows, positions, routed_weights, out, routed_scaling_factor, config))


def sum_arguments(
    rows: Tensor,
    positions: Tensor,
    routed_weights: Tensor,
    out: Tensor,
    routed_scaling_factor: float,
    config: GatherConfig,
) -> dict[str, Any]:
    """Every argument and option of the kernel by name."""
    return {
        "rows_ptr": rows,
        "positions_ptr": positions,
        "routed_weights_ptr": routed_weights,
        "out_ptr": out,
        "tokens": positions.shape[0],
        "rows": rows.shape[0],
        "hidden": rows.shape[1],
        "stride_row": rows.stride(0),
        "stride_wt": routed_weights.stride(0),
        "stride_ws": routed_weights.stride(1),
        "stride_out": out.stride(0),
        "routed_scaling_factor": routed_scaling_factor,
        "SLOTS": positions.shape[1],
        "TOKENS": config.tokens,
        "COLUMNS": config.columns,
        **dependent_launch.options(dependent_launch.is_used(rows)),
        "num_warps": config.num_warps,
    }
