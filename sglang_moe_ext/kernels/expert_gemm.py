"""Grouped GEMM over rows that lie expert after expert, through pointers. Reference: `reference.grouped_gemm`.

Launches do not synchronize, and allocate nothing but the output where none is given.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moe_ext.core import CompileKey, MoEExtError, Quantization, TileConfig
from sglang_moe_ext.kernels.launcher import launch
from sglang_moe_ext.kernels.quantize import STORED_DTYPE, Scales
from sglang_moe_ext.kernels.sorted_down import position_of
from sglang_moe_ext.tables import config_table, grouped_gemm_table
from sglang_moe_ext.tables.grouped_gemm_table import GroupedGemmKey

# These follow the batch and the configuration: specializing on them would make many binaries that differ in nothing.
UNSPECIALIZED = ("experts", "group_m")
_UNQUANTIZED = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(do_not_specialize=UNSPECIALIZED)  # type: ignore[untyped-decorator]
def expert_gemm_kernel(  # type: ignore[no-untyped-def]
    a_ptr, b_ptr, c_ptr, a_scale_ptr, b_scale_ptr, offsets_ptr, experts, N, K, group_m,
    stride_am, stride_be, stride_bn, stride_cm, stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, EXPERTS: tl.constexpr,
    SCALING: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    # Which tile this is follows from the offsets, so that the host never waits for them.
    numbers = tl.arange(0, EXPERTS)
    first_rows = tl.load(offsets_ptr + numbers, mask=numbers < experts, other=0)
    end_rows = tl.load(offsets_ptr + numbers + 1, mask=numbers < experts, other=0)
    tiles = tl.cdiv(end_rows - first_rows, BLOCK_SIZE_M)
    tile_ends = tl.cumsum(tiles, axis=0)
    tiles_m = tl.sum(tiles, axis=0)
    tiles_n = tl.cdiv(N, BLOCK_SIZE_N)
    if tl.program_id(0) >= tiles_m * tiles_n:
        return
    tile_m, tile_n = position_of(tl.program_id(0), tiles_m, tiles_n, group_m)
    expert = tl.sum((tile_ends <= tile_m).to(tl.int32), axis=0)
    is_here = numbers == expert
    first_row = tl.sum(tl.where(is_here, first_rows, 0), axis=0)
    end_row = tl.sum(tl.where(is_here, end_rows, 0), axis=0)
    first_tile = tl.sum(tl.where(is_here, tile_ends - tiles, 0), axis=0)

    rows = first_row + (tile_m - first_tile) * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
    is_row = rows < end_row
    rows = rows.to(tl.int64)
    columns = tile_n * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N).to(tl.int64)
    # Columns past the end read one that is there, and are not stored: no mask on b while K is even.
    b_columns = columns % N
    depth = tl.arange(0, BLOCK_SIZE_K)
    expert = expert.to(tl.int64)
    a_ptrs = a_ptr + rows[:, None] * stride_am + depth
    b_ptrs = b_ptr + expert * stride_be + b_columns * stride_bn + depth[:, None]
    if SCALING == "block":
        a_scale_ptrs = a_scale_ptr + rows * stride_asm
        b_scale_ptrs = b_scale_ptr + expert * stride_bse + b_columns // GROUP_N * stride_bsn

    exact: tl.constexpr = a_ptr.dtype.element_ty == tl.int8 and SCALING != "block"
    acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), tl.int32 if exact else tl.float32)
    for k in range(0, K, BLOCK_SIZE_K):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=is_row[:, None], other=0.0)
            b = tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=is_row[:, None] & (depth < K - k), other=0.0)
            b = tl.load(b_ptrs, mask=depth[:, None] < K - k, other=0.0)
        if SCALING == "weights":
            b = b.to(a.dtype)
        if SCALING == "block":
            a_scale = tl.load(a_scale_ptrs + k // GROUP_K * stride_ask, mask=is_row, other=0.0)
            b_scale = tl.load(b_scale_ptrs + k // GROUP_K * stride_bsk)
            acc += tl.dot(a, b) * (a_scale[:, None] * b_scale[None, :])
        else:
            # Of float32 alone: three products in TF32 keep the bits that one would round away.
            acc = tl.dot(a, b, acc, input_precision="tf32x3", out_dtype=acc.dtype)
        a_ptrs += BLOCK_SIZE_K
        b_ptrs += BLOCK_SIZE_K

    if SCALING == "channel":
        a_scale = tl.load(a_scale_ptr + rows * stride_asm, mask=is_row, other=0.0)
        b_scale = tl.load(b_scale_ptr + expert * stride_bse + b_columns * stride_bsn)
        acc = acc * (a_scale[:, None] * b_scale[None, :])
    elif SCALING == "weights":
        acc = acc * tl.load(b_scale_ptr + expert * stride_bse + b_columns * stride_bsn)[None, :]
    elif SCALING == "tensor":
        acc = acc * (tl.load(a_scale_ptr) * tl.load(b_scale_ptr + expert))
    c_ptrs = c_ptr + rows[:, None] * stride_cm + columns
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=is_row[:, None] & (columns < N))


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    *,
    scales: Scales | None = None,
    out: Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """Multiply the rows of each expert by its weights: `out[rows of e] = a[rows of e] @ b[e].T`.

    Args:
        a: [rows, K], in bfloat16, float16 or float32, or in the eight bits of `scales`.
        b: [experts, N, K], in the dtype of `a`; in int8 for int8_w8a16.
        offsets: int32 [experts + 1] on the same device, ascending from 0: expert e has the rows offsets[e] to
            offsets[e + 1]. Rows behind the last offset are neither read nor written.
        scales: of quantized operands, as `kernels.quantize` makes them.
        out: [rows, N]; made where it is None, in the dtype of `a`, and in bfloat16 for eight bits.
        config: the tile; None takes the entry of the table that `tune --kernel grouped_gemm` wrote for this GPU whose
            number of rows is nearest, and a default where there is no table.

    Returns:
        `out`.

    Raises:
        MoEExtError: shapes, dtypes or scales do not go together.
    """
    _check(a, b, offsets, out)
    if out is None:
        out = torch.empty(
            a.shape[0], b.shape[1], device=a.device, dtype=torch.bfloat16 if a.element_size() == 1 else a.dtype
        )
    quantization = Quantization() if scales is None else scales.quantization
    chosen = config or choose_config(a.shape[0], b.shape[0], key_of(a, quantization), a.device)
    arguments = kernel_arguments(a, b, out, offsets, chosen.compile_key, scales)
    grid = (most_tiles(a.shape[0], b.shape[0], chosen.block_m) * -(-b.shape[1] // chosen.block_n),)
    if grid[0]:
        options = {"group_m": chosen.group_m, "num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
        launch(expert_gemm_kernel, grid, arguments | options)
    return out


def most_tiles(rows: int, experts: int, block_m: int) -> int:
    """Tiles along M that any offsets can need: each expert may leave one that is not full."""
    return rows // block_m + min(experts, rows)


def key_of(a: Tensor, quantization: Quantization) -> GroupedGemmKey:
    """The name of the table that the function looks for."""
    dtype = quantization.scheme or str(a.dtype).removeprefix("torch.")
    return GroupedGemmKey(a.shape[1], dtype, quantization.block_shape)


def choose_config(rows: int, experts: int, key: GroupedGemmKey, device: torch.device) -> TileConfig:
    """The nearest entry of the table for this GPU; the default where there is none, or it does not meet the scales."""
    if device.type == "cuda":
        table = grouped_gemm_table.load(key, torch.cuda.get_device_name(device), triton.__version__)
        if table:
            return table[config_table.nearest(table, rows)]
    return default_config(rows, experts, key)


def default_config(rows: int, experts: int, key: GroupedGemmKey) -> TileConfig:
    """A tile as tall as the mean expert, between 16 and 128 rows."""
    mean = -(-rows // experts)
    block_m = next((size for size in (16, 32, 64) if mean <= size), 128)
    # More registers than these tiles take are spilled (sm_89, Triton 3.7.1): three products in TF32, scales of blocks.
    if key.dtype == "float32":
        return TileConfig(min(block_m, 64), 64, 32, 8, 8, 3)
    if key.block_shape is not None:
        return TileConfig(block_m, 64, min(128, key.block_shape[1]), 8, 8 if block_m == 128 else 4, 3)
    return TileConfig(block_m, 128 if block_m > 32 else 64, 64, 8, 8 if block_m == 128 else 4, 3)


def kernel_arguments(
    a: Tensor, b: Tensor, out: Tensor, offsets: Tensor, key: CompileKey, scales: Scales | None
) -> dict[str, Any]:
    """Every argument of the kernel but group_m, by name; no value of a tensor is read, so meta tensors do."""
    experts, columns, k = b.shape
    quantization = Quantization() if scales is None else scales.quantization
    scaling = scaling_of(quantization)
    group_n, group_k = quantization.block_shape or (0, 0)
    a_scale, b_scale = (None, None) if scales is None else (scales.activations, scales.weights)
    _check_key(key, group_k)
    _check_scales(a, b, scales, scaling)
    return {
        "a_ptr": a,
        "b_ptr": b,
        "c_ptr": out,
        "a_scale_ptr": a_scale,
        "b_scale_ptr": b_scale,
        "offsets_ptr": offsets,
        "experts": experts,
        "N": columns,
        "K": k,
        "stride_am": a.stride(0),
        "stride_be": b.stride(0),
        "stride_bn": b.stride(1),
        "stride_cm": out.stride(0),
        **dict(zip(("stride_asm", "stride_ask"), _strides(a_scale, 2), strict=True)),
        **dict(zip(("stride_bse", "stride_bsn", "stride_bsk"), _strides(b_scale, 3), strict=True)),
        "BLOCK_SIZE_M": key.block_m,
        "BLOCK_SIZE_N": key.block_n,
        "BLOCK_SIZE_K": key.block_k,
        "EXPERTS": triton.next_power_of_2(experts),
        "SCALING": scaling,
        "GROUP_N": group_n,
        "GROUP_K": group_k,
        "EVEN_K": k % key.block_k == 0,
    }


@lru_cache
def scaling_of(quantization: Quantization) -> str:
    """How the kernel scales. Raises MoEExtError where it cannot multiply such weights."""
    if quantization.scheme is None:
        return "none"
    if quantization.scheme in STORED_DTYPE and quantization.scales in ("tensor", "channel", "block"):
        return quantization.scales
    if quantization.scheme == "int8_w8a16" and quantization.scales == "channel":
        return "weights"
    raise MoEExtError(
        f"grouped_gemm cannot multiply {quantization}: expected fp8_w8a8 or int8_w8a8 with one scale a tensor, channel "
        "or block, or int8_w8a16 with one a channel"
    )


def _strides(scale: Tensor | None, dimensions: int) -> tuple[int, ...]:
    return scale.stride() if scale is not None and scale.ndim == dimensions else (0,) * dimensions


def _check(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor | None) -> None:
    if a.ndim != 2 or b.ndim != 3 or a.shape[1] != b.shape[2]:
        raise MoEExtError(
            f"grouped_gemm: a {tuple(a.shape)} and b {tuple(b.shape)} do not fit: expected [rows, K] and "
            "[experts, N, K]"
        )
    if offsets.dtype != torch.int32 or offsets.shape != (b.shape[0] + 1,) or offsets.device != a.device:
        raise MoEExtError(
            f"grouped_gemm: offsets {offsets.dtype} {tuple(offsets.shape)} on {offsets.device}: expected int32 "
            f"[{b.shape[0] + 1}] on {a.device}, from 0 to the number of rows"
        )
    if any(tensor.shape[-1] > 1 and tensor.stride(-1) != 1 for tensor in (a, b)):
        raise MoEExtError("grouped_gemm: K is not contiguous in a or b: call .contiguous()")
    if out is not None and (out.shape != (a.shape[0], b.shape[1]) or out.stride(-1) != 1):
        raise MoEExtError(f"grouped_gemm: out {tuple(out.shape)}: expected contiguous {[a.shape[0], b.shape[1]]}")


def _check_key(key: CompileKey, group_k: int) -> None:
    if key.use_tma:
        raise MoEExtError("grouped_gemm reads through pointers: leave USE_TMA out of the configuration")
    if group_k and group_k % key.block_k:
        raise MoEExtError(
            f"BLOCK_SIZE_K={key.block_k} spans more than one scale of {group_k} along K: take a divisor of {group_k}"
        )


def _check_scales(a: Tensor, b: Tensor, scales: Scales | None, scaling: str) -> None:
    if scales is None:
        if a.dtype not in _UNQUANTIZED or b.dtype != a.dtype:
            raise MoEExtError(
                f"grouped_gemm: a {a.dtype} and b {b.dtype} without scales: expected one 16 or 32-bit dtype"
            )
        return
    expected = {"weights": (None, 3), "tensor": (1, 1)}.get(scaling, (2, 3))
    found = None if scales.activations is None else scales.activations.ndim, scales.weights.ndim
    if found != expected:
        raise MoEExtError(
            f"grouped_gemm: scales of {found} dimensions do not belong to {scales.quantization}: expected {expected}"
        )
    weights = torch.int8 if scaling == "weights" else STORED_DTYPE[str(scales.quantization.scheme)]
    if b.dtype != weights or (scaling != "weights" and a.dtype != weights):
        raise MoEExtError(
            f"grouped_gemm: a {a.dtype} and b {b.dtype} are not {scales.quantization}: expected {weights}"
        )
