"""Grouped up GEMM that writes rows sorted by expert, with optional fused SwiGLU and float8 quantization (Hopper).

The weights keep the engine's layout [E, 2 * columns, K], the rows of the gate first. Launches allocate no memory and do
not synchronize, so a CUDA graph can capture them.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sglang_moe_ext.core import MoEExtError, Quantization
from sglang_moe_ext.kernel_plans import UpConfig
from sglang_moe_ext.kernels import tma
from sglang_moe_ext.kernels.launcher import launch
from sglang_moe_ext.kernels.quantize import Scales
from sglang_moe_ext.kernels.sorted_down import UNSPECIALIZED, position_of, store_tile
from sglang_moe_ext.kernels.swiglu import GROUP, LARGEST_FP8, LEAST_SCALE


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "pairs"))  # type: ignore[untyped-decorator]
def sorted_up_kernel(  # type: ignore[no-untyped-def]
    a_ptr, b_desc, c_desc, a_scale_ptr, b_scale_ptr, c_scale_ptr,
    sorted_token_ids_ptr, expert_ids_ptr, num_tokens_post_padded_ptr, pairs, columns, K, group_m,
    stride_am, stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk, stride_cs,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, TILES_PER_BLOCK: tl.constexpr,
    TOP_K: tl.constexpr, IS_BLOCK_SCALED: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr,
    IS_FUSED: tl.constexpr, HALF_STORES: tl.constexpr, QUANTIZES: tl.constexpr, LEAST_SCALE: tl.constexpr,
    LARGEST: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.load(num_tokens_post_padded_ptr) // BLOCK_SIZE_M
    tiles_n = tl.cdiv(columns, BLOCK_SIZE_N)
    if PERSISTENT:
        # Flat: the loads of the next tile are under way while this one is stored.
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
            tile_m, tile_n = position_of(tile, tiles_m, tiles_n, group_m)
            _tile(
                a_ptr, b_desc, c_desc, a_scale_ptr, b_scale_ptr, c_scale_ptr, sorted_token_ids_ptr,
                tl.load(expert_ids_ptr + tile_m // TILES_PER_BLOCK), tile_m * BLOCK_SIZE_M, tile_n * BLOCK_SIZE_N,
                pairs, columns, K, stride_am, stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk, stride_cs,
                BLOCK_SIZE_M, BLOCK_SIZE_N, BLOCK_SIZE_K, TOP_K, IS_BLOCK_SCALED, GROUP_N, GROUP_K,
                IS_FUSED, HALF_STORES, QUANTIZES, LEAST_SCALE, LARGEST,
            )  # fmt: skip
    else:
        if tl.program_id(0) >= tiles_m * tiles_n:
            return
        tile_m, tile_n = position_of(tl.program_id(0), tiles_m, tiles_n, group_m)
        _tile(
            a_ptr, b_desc, c_desc, a_scale_ptr, b_scale_ptr, c_scale_ptr, sorted_token_ids_ptr,
            tl.load(expert_ids_ptr + tile_m // TILES_PER_BLOCK), tile_m * BLOCK_SIZE_M, tile_n * BLOCK_SIZE_N,
            pairs, columns, K, stride_am, stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk, stride_cs,
            BLOCK_SIZE_M, BLOCK_SIZE_N, BLOCK_SIZE_K, TOP_K, IS_BLOCK_SCALED, GROUP_N, GROUP_K,
            IS_FUSED, HALF_STORES, QUANTIZES, LEAST_SCALE, LARGEST,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    a_ptr, b_desc, c_desc, a_scale_ptr, b_scale_ptr, c_scale_ptr, sorted_token_ids_ptr, expert, row, column,
    pairs, columns, K, stride_am, stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk, stride_cs,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
    TOP_K: tl.constexpr, IS_BLOCK_SCALED: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr,
    IS_FUSED: tl.constexpr, HALF_STORES: tl.constexpr, QUANTIZES: tl.constexpr, LEAST_SCALE: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    rows = row + tl.arange(0, BLOCK_SIZE_M)
    pair = tl.load(sorted_token_ids_ptr + rows)
    token = tl.where(pair < pairs, pair // TOP_K, 0).to(
        tl.int64
    )  # padding rows compute token 0; their results are not read
    a_ptrs = a_ptr + token[:, None] * stride_am + tl.arange(0, BLOCK_SIZE_K)[None, :]
    if IS_BLOCK_SCALED:
        a_scale_ptr += token * stride_asm
        # A pointer load: expert -1 would read outside the scales.
        b_scale_ptr += tl.maximum(expert, 0).to(tl.int64) * stride_bse + column // GROUP_N * stride_bsn
    if IS_FUSED:
        if IS_BLOCK_SCALED:
            gate, up = _block_scaled_pair(
                a_ptrs, b_desc, a_scale_ptr, b_scale_ptr, expert, column, columns, K,
                stride_ask, stride_bsn, stride_bsk, BLOCK_SIZE_M, BLOCK_SIZE_N, BLOCK_SIZE_K, GROUP_N, GROUP_K,
            )  # fmt: skip
        else:
            gate, up = _pair(a_ptrs, b_desc, expert, column, K, BLOCK_SIZE_M, BLOCK_SIZE_N, BLOCK_SIZE_K)
        inner = gate * tl.sigmoid(gate) * up
        if QUANTIZES:
            scale = tl.maximum(tl.max(tl.abs(inner), axis=1), LEAST_SCALE) / LARGEST
            tl.store(c_scale_ptr + rows.to(tl.int64) * stride_cs + column // BLOCK_SIZE_N, scale)
            inner = tl.clamp(inner / scale[:, None], -LARGEST, LARGEST)
        c_desc.store([row, column], inner.to(c_desc.dtype))
    else:
        acc = _product(
            a_ptrs, b_desc, a_scale_ptr, b_scale_ptr, expert, column, K, stride_ask, stride_bsk,
            BLOCK_SIZE_M, BLOCK_SIZE_N, BLOCK_SIZE_K, IS_BLOCK_SCALED, GROUP_K,
        )  # fmt: skip
        store_tile(c_desc, acc, None, None, row, column, columns, 0, 0, BLOCK_SIZE_M, BLOCK_SIZE_N, "none", HALF_STORES)


@triton.jit  # type: ignore[untyped-decorator]
def _pair(  # type: ignore[no-untyped-def]
    a_ptrs, b_desc, expert, column, K,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
):  # fmt: skip
    """The gate tile and the up tile of the same columns. One TMA box loads both: one product of twice the width."""
    acc = tl.zeros((BLOCK_SIZE_M, 2 * BLOCK_SIZE_N), tl.float32)
    for k in tl.range(0, K, BLOCK_SIZE_K):
        a = tl.load(a_ptrs + k)
        b = b_desc.load([2 * expert, column, k]).reshape(2 * BLOCK_SIZE_N, BLOCK_SIZE_K)
        acc = tl.dot(a, b.T, acc)
    # Both halves of a column pair lie in the same thread: the split moves no data.
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_SIZE_M, 2, BLOCK_SIZE_N)), (0, 2, 1)))


@triton.jit  # type: ignore[untyped-decorator]
def _block_scaled_pair(  # type: ignore[no-untyped-def]
    a_ptrs, b_desc, a_scale_ptrs, b_scale_ptr, expert, column, columns, K, stride_ask, stride_bsn, stride_bsk,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
    GROUP_N: tl.constexpr, GROUP_K: tl.constexpr,
):  # fmt: skip
    """As `_pair`, in two products that share A, so that only one partial product is held at a time."""
    gate = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), tl.float32)
    up = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), tl.float32)
    up_scale_ptr = b_scale_ptr + columns // GROUP_N * stride_bsn
    for k in tl.range(0, K, BLOCK_SIZE_K):
        a = tl.load(a_ptrs + k)
        b_gate = b_desc.load([2 * expert, column, k]).reshape(BLOCK_SIZE_N, BLOCK_SIZE_K)
        b_up = b_desc.load([2 * expert + 1, column, k]).reshape(BLOCK_SIZE_N, BLOCK_SIZE_K)
        group = k // GROUP_K
        a_scale = tl.load(a_scale_ptrs + group * stride_ask)
        gate += tl.dot(a, b_gate.T) * (a_scale * tl.load(b_scale_ptr + group * stride_bsk))[:, None]
        up += tl.dot(a, b_up.T) * (a_scale * tl.load(up_scale_ptr + group * stride_bsk))[:, None]
    return gate, up


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    a_ptrs, b_desc, a_scale_ptrs, b_scale_ptr, expert, column, K, stride_ask, stride_bsk,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
    IS_BLOCK_SCALED: tl.constexpr, GROUP_K: tl.constexpr,
):  # fmt: skip
    """One tile of the unfused product, gate and up columns as stored."""
    acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), tl.float32)
    for k in tl.range(0, K, BLOCK_SIZE_K):
        a = tl.load(a_ptrs + k)
        b = b_desc.load([expert, column, k]).reshape(BLOCK_SIZE_N, BLOCK_SIZE_K)
        if IS_BLOCK_SCALED:
            group = k // GROUP_K
            scale = tl.load(a_scale_ptrs + group * stride_ask) * tl.load(b_scale_ptr + group * stride_bsk)
            acc += tl.dot(a, b.T) * scale[:, None]
        else:
            acc = tl.dot(a, b.T, acc)
    return acc


def launch_up(
    a: Tensor,
    weights: Tensor,
    out: Tensor,
    sorted_token_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    config: UpConfig,
    *,
    pairs: int,
    top_k: int,
    align_block_m: int,
    scales: Scales | None = None,
    out_scale: Tensor | None = None,
) -> None:
    """Write out = silu(gate) * up for the tokens of `a`, gathered into the order of `sorted_token_ids`.

    Args:
        a: [tokens, K].
        weights: [experts, 2 * columns, K], the gate's rows first.
        out: [rows, columns]; [rows, 2 * columns] of gate and up where `config` is not fused. Padding rows hold
            undefined values afterwards.
        pairs: tokens * top_k.
        align_block_m: rows of a block of the sort.
        scales: block-wise float8 scales of `a` and `weights`.
        out_scale: float32 [rows, columns / 128]; with it, `out` is float8_e4m3fn, as `swiglu` quantizes it.

    Raises:
        MoEExtError: tile, scales and alignment do not fit together.
    """
    arguments = up_arguments(
        a, weights, out, sorted_token_ids, expert_ids, num_tokens_post_padded, config,
        pairs=pairs, top_k=top_k, align_block_m=align_block_m, scales=scales, out_scale=out_scale,
    )  # fmt: skip
    tiles = expert_ids.numel() * arguments["TILES_PER_BLOCK"] * -(-out.shape[1] // config.block_n)
    launch(sorted_up_kernel, tma.grid(config, tiles, a.device), arguments)


def up_arguments(
    a: Tensor,
    weights: Tensor,
    out: Tensor,
    sorted_token_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    config: UpConfig,
    *,
    pairs: int,
    top_k: int,
    align_block_m: int,
    scales: Scales | None,
    out_scale: Tensor | None,
) -> dict[str, Any]:
    """Every argument and option of the kernel by name. Reads no tensor values: meta tensors work."""
    k, columns = weights.shape[2], out.shape[1]
    quantization = Quantization() if scales is None else scales.quantization
    group_n, group_k = quantization.block_shape or (0, 0)
    _check(a, weights, out, config, align_block_m, quantization, out_scale)
    a_scale, b_scale = (None, None) if scales is None else (scales.activations, scales.weights)
    return {
        "a_ptr": a,
        "b_desc": _weights_descriptor(weights, config, is_scaled=scales is not None),
        "c_desc": tma.descriptor(out, config.block_m, config.block_n // (2 if config.half_stores else 1)),
        "a_scale_ptr": a_scale,
        "b_scale_ptr": b_scale,
        "c_scale_ptr": out_scale,
        "sorted_token_ids_ptr": sorted_token_ids,
        "expert_ids_ptr": expert_ids,
        "num_tokens_post_padded_ptr": num_tokens_post_padded,
        "pairs": pairs,
        "columns": columns,
        "K": k,
        "group_m": config.group_m,
        "stride_am": a.stride(0),
        **tma.scale_strides(a_scale, b_scale),
        "stride_cs": 0 if out_scale is None else out_scale.stride(0),
        "BLOCK_SIZE_M": config.block_m,
        "BLOCK_SIZE_N": config.block_n,
        "BLOCK_SIZE_K": config.block_k,
        "TILES_PER_BLOCK": align_block_m // config.block_m,
        "TOP_K": top_k,
        "IS_BLOCK_SCALED": scales is not None,
        "GROUP_N": group_n,
        "GROUP_K": group_k,
        "IS_FUSED": config.is_fused,
        "HALF_STORES": config.half_stores,
        "QUANTIZES": out_scale is not None,
        "LEAST_SCALE": LEAST_SCALE,
        "LARGEST": LARGEST_FP8,
        "PERSISTENT": config.persistent,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _weights_descriptor(weights: Tensor, config: UpConfig, *, is_scaled: bool) -> TensorDescriptor:
    """Fused: over [2 * E, columns, K], gate and up in turn; a box holds both, or one of them where scaled."""
    if not config.is_fused:
        return tma.descriptor(weights, 1, config.block_n, config.block_k)
    experts, rows, k = weights.shape
    halves = weights.view(2 * experts, rows // 2, k)
    return tma.descriptor(halves, 1 if is_scaled else 2, config.block_n, config.block_k)


def _check(
    a: Tensor,
    weights: Tensor,
    out: Tensor,
    config: UpConfig,
    align_block_m: int,
    quantization: Quantization,
    out_scale: Tensor | None,
) -> None:
    _, rows_of_b, k = weights.shape
    columns = out.shape[1]
    if (
        rows_of_b != (2 if config.is_fused else 1) * columns
        or a.shape[1] != k
        or columns % config.block_n
        or k % config.block_k
    ):
        raise MoEExtError(
            f"a {tuple(a.shape)}, weights {tuple(weights.shape)}, out {tuple(out.shape)} with tiles of "
            f"{config.block_n} columns and {config.block_k} along K: expected whole tiles of [tokens, K], [E, N, K]"
        )
    if quantization.scheme is not None and not quantization.is_block_wise:
        raise MoEExtError(f"the fused up projection cannot do {quantization}: give it 16 bits or block-wise fp8_w8a8")
    if out_scale is not None and (config.block_n != GROUP or not config.is_fused):
        raise MoEExtError(f"block_n={config.block_n}: a quantized tile has exactly the {GROUP} columns of one scale")
    tile = (config.block_m, config.block_n, config.block_k)
    tma.check_tile(tile, k, align_block_m, quantization, a.device, groups_of_columns=1)
