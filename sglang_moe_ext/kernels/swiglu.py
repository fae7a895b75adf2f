"""SwiGLU of rows sorted by expert, with optional float8 quantization, in one pass.

The engine's activation and quantization take two passes over the largest possible number of rows; this one stops at
num_tokens_post_padded, which it reads on the device. Padding rows are undefined before and after.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.kernel_plans import SCALE_GROUP
from sglang_moe_ext.kernels.launcher import launch

GROUP = SCALE_GROUP
"""Columns that share one scale."""
_ROWS = 4
LONGEST_ROW = 8192
"""Most columns that one program holds."""
LEAST_SCALE = 1e-10
LARGEST_FP8 = 448.0
"""Largest finite float8_e4m3fn."""


def launch_swiglu(
    gate_up: Tensor, num_tokens_post_padded: Tensor, out: Tensor, *, scales: Tensor | None = None
) -> None:
    """Write out = silu(gate_up[:, :columns]) * gate_up[:, columns:].

    Args:
        gate_up: [rows, 2 * columns]; [rows, columns] is only quantized.
        out: [rows, columns]; float8_e4m3fn where `scales` is given.
        scales: float32 [rows, columns / 128], one for each group of 128 columns, as a block-wise down GEMM reads them.

    Raises:
        MoEExtError: the shapes do not fit together.
    """
    rows, columns = out.shape
    if tuple(gate_up.shape) not in ((rows, 2 * columns), (rows, columns)) or columns % GROUP:
        raise MoEExtError(
            f"gate_up {tuple(gate_up.shape)} and out {tuple(out.shape)}: expected [rows, 2 * columns] and "
            f"[rows, columns], columns a multiple of {GROUP}"
        )
    arguments = swiglu_arguments(gate_up, num_tokens_post_padded, out, scales)
    launch(swiglu_kernel, (triton.cdiv(rows, _ROWS), columns // GROUP), arguments)


def launch_swiglu_of_rows(gate_up: Tensor, num_tokens_post_padded: Tensor | None, out: Tensor, scales: Tensor) -> None:
    """As `launch_swiglu`, with one scale a row: `scales` float32 [rows, 1], `out` float8_e4m3fn [rows, columns].

    Where `num_tokens_post_padded` is None, all rows are there, as of the hidden states.

    Raises:
        MoEExtError: the shapes do not fit together, or a row is too long for one program.
    """
    rows, columns = out.shape
    fits = tuple(gate_up.shape) in ((rows, 2 * columns), (rows, columns)) and tuple(scales.shape) == (rows, 1)
    if not fits or columns > LONGEST_ROW:
        raise MoEExtError(
            f"gate_up {tuple(gate_up.shape)}, out {tuple(out.shape)} and scales {tuple(scales.shape)}: expected "
            f"[rows, 2 * columns] or [rows, columns], [rows, columns] and [rows, 1], at most {LONGEST_ROW} columns"
        )
    launch(swiglu_of_rows_kernel, (rows,), rows_arguments(gate_up, num_tokens_post_padded, out, scales))


def rows_arguments(
    gate_up: Tensor, num_tokens_post_padded: Tensor | None, out: Tensor, scales: Tensor
) -> dict[str, Any]:
    """Every argument and option of the kernel by name."""
    return {
        "gate_up_ptr": gate_up,
        "num_tokens_post_padded_ptr": num_tokens_post_padded,
        "out_ptr": out,
        "scales_ptr": scales,
        "columns": out.shape[1],
        "stride_in": gate_up.stride(0),
        "stride_out": out.stride(0),
        "WIDTH": triton.next_power_of_2(out.shape[1]),
        "IS_GATED": gate_up.shape[1] > out.shape[1],
        "LEAST_SCALE": LEAST_SCALE,
        "LARGEST": LARGEST_FP8,
        "num_warps": 4,
    }


def launch_quantize(values: Tensor, out: Tensor, scales: Tensor) -> None:
    """Quantize all rows of `values` into `out` float8_e4m3fn [rows, columns] and `scales` [rows, columns / 128].

    For one scale a row: `launch_swiglu_of_rows`.

    Raises:
        MoEExtError: the columns are not a multiple of the group.
    """
    rows, columns = out.shape
    if columns % GROUP:
        raise MoEExtError(f"{columns} columns: expected a multiple of {GROUP}")
    arguments = swiglu_arguments(values, None, out, scales)
    launch(swiglu_kernel, (triton.cdiv(rows, _ROWS), columns // GROUP), arguments)


def swiglu_arguments(
    gate_up: Tensor, num_tokens_post_padded: Tensor | None, out: Tensor, scales: Tensor | None
) -> dict[str, Any]:
    """Every argument and option of the kernel by name."""
    return {
        "gate_up_ptr": gate_up,
        "num_tokens_post_padded_ptr": num_tokens_post_padded,
        "out_ptr": out,
        "scales_ptr": scales,
        "rows": out.shape[0],
        "columns": out.shape[1],
        "stride_in": gate_up.stride(0),
        "stride_out": out.stride(0),
        "stride_scales": 0 if scales is None else scales.stride(0),
        "ROWS": _ROWS,
        "GROUP": GROUP,
        "IS_GATED": gate_up.shape[1] > out.shape[1],
        "QUANTIZES": scales is not None,
        "LEAST_SCALE": LEAST_SCALE,
        "LARGEST": LARGEST_FP8,
        "num_warps": 4,
    }


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def swiglu_kernel(  # type: ignore[no-untyped-def]
    gate_up_ptr,
    num_tokens_post_padded_ptr,
    out_ptr,
    scales_ptr,
    rows,
    columns,
    stride_in,
    stride_out,
    stride_scales,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    IS_GATED: tl.constexpr,
    QUANTIZES: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
    LARGEST: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    used = rows
    if num_tokens_post_padded_ptr is not None:
        used = tl.load(num_tokens_post_padded_ptr)
    if first >= used:
        return
    row = (first + tl.arange(0, ROWS)).to(tl.int64)
    there = (row < used)[:, None]
    column = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    gate_ptrs = gate_up_ptr + row[:, None] * stride_in + column
    inner = tl.load(gate_ptrs, mask=there, other=0.0).to(tl.float32)
    if IS_GATED:
        up = tl.load(gate_ptrs + columns, mask=there, other=0.0).to(tl.float32)
        inner = inner * tl.sigmoid(inner) * up
    out_ptrs = out_ptr + row[:, None] * stride_out + column
    if QUANTIZES:
        # The engine rounds here, between its two passes.
        inner = inner.to(gate_up_ptr.dtype.element_ty).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(inner), axis=1), LEAST_SCALE) / LARGEST
        tl.store(scales_ptr + row * stride_scales + tl.program_id(1), scale, mask=row < used)
        inner = tl.clamp(inner / scale[:, None], -LARGEST, LARGEST)
    tl.store(out_ptrs, inner.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def swiglu_of_rows_kernel(  # type: ignore[no-untyped-def]
    gate_up_ptr, num_tokens_post_padded_ptr, out_ptr, scales_ptr, columns, stride_in, stride_out,
    WIDTH: tl.constexpr, IS_GATED: tl.constexpr, LEAST_SCALE: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    used = tl.num_programs(0)
    if num_tokens_post_padded_ptr is not None:
        used = tl.load(num_tokens_post_padded_ptr)
    if row >= used:
        return
    column = tl.arange(0, WIDTH)
    there = column < columns
    gate_ptrs = gate_up_ptr + row * stride_in + column
    inner = tl.load(gate_ptrs, mask=there, other=0.0).to(tl.float32)
    if IS_GATED:
        up = tl.load(gate_ptrs + columns, mask=there, other=0.0).to(tl.float32)
        # The engine rounds here, between its two passes.
        inner = (inner * tl.sigmoid(inner) * up).to(gate_up_ptr.dtype.element_ty).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(inner), axis=0), LEAST_SCALE) / LARGEST
    tl.store(scales_ptr + row, scale)
    quantized = tl.clamp(inner / scale, -LARGEST, LARGEST).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride_out + column, quantized, mask=there)
