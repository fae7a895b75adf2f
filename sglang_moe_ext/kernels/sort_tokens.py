"""Sort the pairs of tokens and experts by expert, and quantize the tokens meanwhile. Reference: `reference.moe_align`.

Three launches. In `count_kernel`, a program counts the pairs of each expert in one chunk of pairs; the other programs
quantize tokens, which needs no order. In `scan_kernel`, the program of an expert adds up its counts, chunk by chunk. In
`place_kernel`, a program places the pairs of one chunk, stably; the other programs write the blocks and the padding of
one expert. Nothing is atomic, nothing has to be zero before, and nothing synchronizes: the same input gives the same
bits.

Pairs whose id is no local expert (-1 under expert parallelism) are left out, with position -1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.kernel_plans import MOST_SORTED_EXPERTS, padded_rows
from sglang_moe_ext.kernels import dependent_launch
from sglang_moe_ext.kernels.dependent_launch import let_next_start, wait_for_last
from sglang_moe_ext.kernels.launcher import launch
from sglang_moe_ext.kernels.swiglu import GROUP, LARGEST_FP8, LEAST_SCALE, LONGEST_ROW

CHUNK = 128
"""Pairs that one program ranks, each against each."""
_SCANNED_AT_ONCE = 1024
_QUANTIZED_AT_ONCE = 8192
"""Values that one program quantizes: four loads of 16 bytes a thread."""


@dataclass(frozen=True, slots=True)
class SortedTokens:
    """Pairs in the order of the experts, each expert padded to whole blocks.

    ids: int32 [rows], the pair of each row, or the number of pairs where a row is padding. experts: int32 [blocks].
    padded: int32 [1], rows in use; what lies behind them is undefined. positions: int32 [tokens, slots], the row of
    each pair, -1 for one that is left out; None where another sort than ours did not say it.
    """

    ids: Tensor
    experts: Tensor
    padded: Tensor
    positions: Tensor | None = None


@dataclass(frozen=True, slots=True)
class QuantizedTokens:
    """values: float8_e4m3fn [tokens, hidden]; scale: float32 [tokens, hidden / 128], or [tokens, 1] for whole rows."""

    values: Tensor
    scale: Tensor


@triton.jit(do_not_specialize=["pairs", "chunks", "tokens"])  # type: ignore[untyped-decorator]
def count_kernel(  # type: ignore[no-untyped-def]
    topk_ids_ptr,
    counts_ptr,
    hidden_ptr,
    values_ptr,
    scale_ptr,
    pairs,
    chunks,
    tokens,
    columns,
    stride_hidden,
    stride_scale,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    QUANTIZES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
    LARGEST: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    let_next_start(DEPENDENT)
    program = tl.program_id(0)
    if program < chunks:
        pair = program * CHUNK + tl.arange(0, CHUNK)
        expert = tl.load(topk_ids_ptr + pair, mask=pair < pairs, other=-1).to(tl.int32)
        is_here = (expert >= 0) & (expert < EXPERTS)
        # Pairs that are not here are counted as the first expert's, and taken off again.
        left_out = tl.sum(1 - is_here.to(tl.int32), axis=0)
        bins = tl.arange(0, BINS)
        counts = tl.histogram(tl.where(is_here, expert, 0), BINS) - tl.where(bins == 0, left_out, 0)
        tl.store(counts_ptr + bins * chunks + program, counts, mask=bins < EXPERTS)
    elif QUANTIZES:
        tile, groups = program - chunks, tl.cdiv(columns, WIDTH)
        row = ((tile // groups) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        column = (tile % groups) * WIDTH + tl.arange(0, WIDTH)
        there = (row < tokens)[:, None] & (column < columns)
        value = tl.load(hidden_ptr + row[:, None] * stride_hidden + column, mask=there, other=0.0).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(value), axis=1), LEAST_SCALE) / LARGEST
        tl.store(scale_ptr + row * stride_scale + tile % groups, scale, mask=row < tokens)
        value = tl.clamp(value / scale[:, None], -LARGEST, LARGEST).to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + row[:, None] * columns + column, value, mask=there)


@triton.jit(do_not_specialize=["chunks"])  # type: ignore[untyped-decorator]
def scan_kernel(  # type: ignore[no-untyped-def]
    counts_ptr, totals_ptr, chunks, WIDTH: tl.constexpr, DEPENDENT: tl.constexpr
):
    """Each count becomes the sum of those before it."""
    let_next_start(DEPENDENT)
    wait_for_last(DEPENDENT)
    counts_ptr += tl.program_id(0) * chunks
    total = 0
    for first in range(0, chunks, WIDTH):
        chunk = first + tl.arange(0, WIDTH)
        counts = tl.load(counts_ptr + chunk, mask=chunk < chunks, other=0)
        tl.store(counts_ptr + chunk, total + tl.cumsum(counts, axis=0) - counts, mask=chunk < chunks)
        total += tl.sum(counts, axis=0)
    tl.store(totals_ptr + tl.program_id(0), total)


@triton.jit(do_not_specialize=["pairs", "chunks"])  # type: ignore[untyped-decorator]
def place_kernel(  # type: ignore[no-untyped-def]
    topk_ids_ptr,
    before_ptr,
    totals_ptr,
    ids_ptr,
    experts_ptr,
    padded_ptr,
    positions_ptr,
    pairs,
    chunks,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    let_next_start(DEPENDENT)
    wait_for_last(DEPENDENT)
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    totals = tl.load(totals_ptr + bins, mask=bins < EXPERTS, other=0)
    padded = tl.cdiv(totals, BLOCK_SIZE_M) * BLOCK_SIZE_M
    begins = tl.cumsum(padded, axis=0) - padded
    if program < chunks:
        place = tl.arange(0, CHUNK)
        pair = program * CHUNK + place
        expert = tl.load(topk_ids_ptr + pair, mask=pair < pairs, other=-1).to(tl.int32)
        is_here = (expert >= 0) & (expert < EXPERTS)
        local = tl.where(is_here, expert, 0)
        same_before = (expert[:, None] == expert[None, :]) & (place[:, None] > place[None, :])
        row = tl.gather(begins, local, axis=0) + tl.load(before_ptr + local * chunks + program)
        row += tl.sum(same_before.to(tl.int32), axis=1)
        tl.store(ids_ptr + row, pair, mask=is_here)
        tl.store(positions_ptr + pair, tl.where(is_here, row, -1), mask=pair < pairs)
    else:
        owner = program - chunks
        is_it = bins == owner
        begin = tl.sum(tl.where(is_it, begins, 0), axis=0)
        total = tl.sum(tl.where(is_it, totals, 0), axis=0)
        blocks = tl.cdiv(total, BLOCK_SIZE_M)
        padding = total + tl.arange(0, BLOCK_SIZE_M)
        tl.store(ids_ptr + begin + padding, pairs, mask=padding < blocks * BLOCK_SIZE_M)
        for first in range(0, blocks, BLOCK_SIZE_M):
            block = first + tl.arange(0, BLOCK_SIZE_M)
            tl.store(experts_ptr + begin // BLOCK_SIZE_M + block, owner, mask=block < blocks)
        if owner == EXPERTS - 1:
            tl.store(padded_ptr, begin + blocks * BLOCK_SIZE_M)


def launch_sort(
    topk_ids: Tensor,
    experts: int,
    block_m: int,
    *,
    hidden: Tensor | None = None,
    quantized: QuantizedTokens | None = None,
) -> SortedTokens:
    """Sort the pairs; where `quantized` is given, quantize `hidden` into it as well, as `swiglu.launch_quantize` does.

    Args:
        topk_ids: int32 or int64 [tokens, slots].
        experts: local experts; ids outside of 0 to experts - 1 are left out.
        block_m: rows of a block.
        hidden: [tokens, hidden size], rows contiguous.

    Raises:
        MoEExtError: the shapes do not fit together, or there are more experts than MOST_SORTED_EXPERTS.
    """
    if (
        topk_ids.dim() != 2
        or topk_ids.dtype not in (torch.int32, torch.int64)
        or not 0 < experts <= MOST_SORTED_EXPERTS
    ):
        raise MoEExtError(
            f"topk_ids {tuple(topk_ids.shape)} {topk_ids.dtype} of {experts} experts: expected int32 or int64 "
            f"[tokens, slots] of 1 to {MOST_SORTED_EXPERTS} experts"
        )
    topk_ids = topk_ids.contiguous()
    pairs, made = topk_ids.numel(), empty_sorted(topk_ids, experts, block_m)
    if pairs == 0:
        made.padded.zero_()
        return made
    chunks = triton.cdiv(pairs, CHUNK)
    counts = topk_ids.new_empty(experts, chunks, dtype=torch.int32)
    totals = topk_ids.new_empty(experts, dtype=torch.int32)
    counting = count_arguments(topk_ids, counts, hidden, quantized)
    launch(count_kernel, (chunks + _tiles(quantized),), counting)
    launch(scan_kernel, (experts,), scan_arguments(counts, totals))
    launch(place_kernel, (chunks + experts,), place_arguments(topk_ids, counts, totals, made, block_m))
    return made


def empty_sorted(topk_ids: Tensor, experts: int, block_m: int) -> SortedTokens:
    """Buffers for any routing of so many pairs, as large as those of the engine's sort."""
    rows = padded_rows(topk_ids.numel(), experts, block_m)

    def empty(*size: int) -> Tensor:
        return topk_ids.new_empty(size, dtype=torch.int32)

    return SortedTokens(empty(rows), empty(triton.cdiv(rows, block_m)), empty(1), empty(*topk_ids.shape))


def count_arguments(
    topk_ids: Tensor, counts: Tensor, hidden: Tensor | None, quantized: QuantizedTokens | None
) -> dict[str, Any]:
    """Every argument and option of the kernel by name.

    Raises:
        MoEExtError: the tokens and what they are quantized into do not fit together.
    """
    rows, width = _tile(quantized)
    if quantized is not None:
        _check_quantized(topk_ids, hidden, quantized)
    return {
        "topk_ids_ptr": topk_ids,
        "counts_ptr": counts,
        "hidden_ptr": hidden if quantized is not None else None,
        "values_ptr": None if quantized is None else quantized.values,
        "scale_ptr": None if quantized is None else quantized.scale,
        "pairs": topk_ids.numel(),
        "chunks": counts.shape[1],
        "tokens": topk_ids.shape[0],
        "columns": 0 if quantized is None else quantized.values.shape[1],
        "stride_hidden": 0 if hidden is None or quantized is None else hidden.stride(0),
        "stride_scale": 0 if quantized is None else quantized.scale.stride(0),
        "EXPERTS": counts.shape[0],
        "BINS": triton.next_power_of_2(counts.shape[0]),
        "CHUNK": CHUNK,
        "QUANTIZES": quantized is not None,
        "ROWS": rows,
        "WIDTH": width,
        "LEAST_SCALE": LEAST_SCALE,
        "LARGEST": LARGEST_FP8,
        "DEPENDENT": dependent_launch.is_used(topk_ids),  # the first of the chain, which waits for nothing
        "num_warps": 8,
    }


def scan_arguments(counts: Tensor, totals: Tensor) -> dict[str, Any]:
    """Every argument and option of the kernel by name."""
    return {
        "counts_ptr": counts,
        "totals_ptr": totals,
        "chunks": counts.shape[1],
        "WIDTH": _SCANNED_AT_ONCE,
        **dependent_launch.options(dependent_launch.is_used(counts)),
        "num_warps": 4,
    }


def place_arguments(
    topk_ids: Tensor, before: Tensor, totals: Tensor, made: SortedTokens, block_m: int
) -> dict[str, Any]:
    """Every argument and option of the kernel by name."""
    return {
        "topk_ids_ptr": topk_ids,
        "before_ptr": before,
        "totals_ptr": totals,
        "ids_ptr": made.ids,
        "experts_ptr": made.experts,
        "padded_ptr": made.padded,
        "positions_ptr": made.positions,
        "pairs": topk_ids.numel(),
        "chunks": before.shape[1],
        "EXPERTS": before.shape[0],
        "BINS": triton.next_power_of_2(before.shape[0]),
        "CHUNK": CHUNK,
        "BLOCK_SIZE_M": block_m,
        **dependent_launch.options(dependent_launch.is_used(topk_ids)),
        "num_warps": 8,
    }


def _tile(quantized: QuantizedTokens | None) -> tuple[int, int]:
    """Tokens and columns that one program quantizes."""
    is_grouped = quantized is None or quantized.scale.shape[1] > 1 or quantized.values.shape[1] == GROUP
    width = GROUP if is_grouped or quantized is None else triton.next_power_of_2(quantized.values.shape[1])
    return _QUANTIZED_AT_ONCE // width, width


def _tiles(quantized: QuantizedTokens | None) -> int:
    if quantized is None:
        return 0
    (tokens, columns), (rows, width) = quantized.values.shape, _tile(quantized)
    return -(-tokens // rows) * -(-columns // width)


def _check_quantized(topk_ids: Tensor, hidden: Tensor | None, quantized: QuantizedTokens) -> None:
    (tokens, columns), scale = quantized.values.shape, tuple(quantized.scale.shape)
    is_grouped = columns % GROUP == 0 and scale == (tokens, columns // GROUP)
    is_of_rows = columns <= LONGEST_ROW and scale == (tokens, 1)
    if hidden is None or tuple(hidden.shape) != (topk_ids.shape[0], columns) or not (is_grouped or is_of_rows):
        raise MoEExtError(
            f"hidden {None if hidden is None else tuple(hidden.shape)}, values {(tokens, columns)}, scales {scale}: "
            f"expected [tokens, hidden] twice, and [tokens, hidden / {GROUP}], or [tokens, 1] of at most "
            f"{LONGEST_ROW} columns"
        )
    if hidden.stride(1) != 1 or not quantized.values.is_contiguous() or quantized.scale.stride(1) != 1:
        raise MoEExtError("the columns of hidden, and all of values and scales, must be contiguous")
