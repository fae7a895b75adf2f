"""The up projection into the order of the experts (Hopper), with SwiGLU and float8 quantization in it or without.

The weights stay as the engine has them: [E, 2 * columns, K], the gate's rows first. Nothing here allocates or waits.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sglang_moe_ext.core import MoEExtError, Quantization
from sglang_moe_ext.kernels import tma
from sglang_moe_ext.kernels.launcher import launch
from sglang_moe_ext.kernels.quantize import Scales
from sglang_moe_ext.kernels.sorted_down import UNSPECIALISED, position_of, store_tile
from sglang_moe_ext.kernels.swiglu import GROUP, LARGEST_FP8, LEAST_SCALE
from sglang_moe_ext.sorted_kernels import UpConfig


@triton.jit(do_not_specialize=(*UNSPECIALISED, "pairs"))  # type: ignore[untyped-decorator]
def sorted_up_kernel(  # type: ignore[no-untyped-def]
    a_ptr, b_desc, c_desc, a_scale_ptr, b_scale_ptr, c_scale_ptr,
    sorted_token_ids_ptr, expert_ids_ptr, num_tokens_post_padded_ptr, pairs, columns, K, group_m,
    stride_am, stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk, stride_cs,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, TILES_PER_BLOCK: tl.constexpr,
    TOP_K: tl.constexpr, IS_BLOCK_SCALED: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr,
    IS_FUSED: tl.constexpr, HALF_STORES: tl.constexpr, QUANTISES: tl.constexpr, LEAST_SCALE: tl.constexpr,
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
                IS_FUSED, HALF_STORES, QUANTISES, LEAST_SCALE, LARGEST,
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
            IS_FUSED, HALF_STORES, QUANTISES, LEAST_SCALE, LARGEST,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    a_ptr, b_desc, c_desc, a_scale_ptr, b_scale_ptr, c_scale_ptr, sorted_token_ids_ptr, expert, row, column,
    pairs, columns, K, stride_am, stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk, stride_cs,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
    TOP_K: tl.constexpr, IS_BLOCK_SCALED: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr,
    IS_FUSED: tl.constexpr, HALF_STORES: tl.constexpr, QUANTISES: tl.constexpr, LEAST_SCALE: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    rows = row + tl.arange(0, BLOCK_SIZE_M)
    pair = tl.load(sorted_token_ids_ptr + rows)
    token = tl.where(pair < pairs, pair // TOP_K, 0).to(tl.int64)  # rows of padding compute something that nobody reads
    a_ptrs = a_ptr + token[:, None] * stride_am + tl.arange(0, BLOCK_SIZE_K)[None, :]
    if IS_BLOCK_SCALED:
        a_scale_ptr += token * stride_asm
        # Read through a pointer, which expert -1 would lead astray.
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
        if QUANTISES:
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
    """The same tile of the gate and of the up half, which one box of TMA brings: one product, twice as wide."""
    acc = tl.zeros((BLOCK_SIZE_M, 2 * BLOCK_SIZE_N), tl.float32)
    for k in tl.range(0, K, BLOCK_SIZE_K):
        a = tl.load(a_ptrs + k)
        b = b_desc.load([2 * expert, column, k]).reshape(2 * BLOCK_SIZE_N, BLOCK_SIZE_K)
        acc = tl.dot(a, b.T, acc)
    # Columns that far apart lie in the same thread: this moves nothing.
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_SIZE_M, 2, BLOCK_SIZE_N)), (0, 2, 1)))


@triton.jit  # type: ignore[untyped-decorator]
def _block_scaled_pair(  # type: ignore[no-untyped-def]
    a_ptrs, b_desc, a_scale_ptrs, b_scale_ptr, expert, column, columns, K, stride_ask, stride_bsn, stride_bsk,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
    GROUP_N: tl.constexpr, GROUP_K: tl.constexpr,
):  # fmt: skip
    """The same, as two products that share A: only a half's partial products are held at once."""
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
    """One tile of gate and up as they lie."""
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
    """out [rows, columns] = silu(gate) * up, of `a` [tokens, K] gathered into the order of sorted_token_ids.

    Where the configuration is not fused, out is [rows, 2 * columns]: gate and up.

    `pairs` = tokens * top_k. `scales` block-wise float8 of `a` and `weights`. With `out_scale` float32
    [rows, columns / 128] out is float8_e4m3fn, as `sorted_activation` makes it. Rows of padding come to hold anything.

    Raises: MoEExtError where tiles, scales and alignment do not go together.
    """
    arguments = up_arguments(
        a, weights, out, sorted_token_ids, expert_ids, num_tokens_post_padded, config,
        pairs=pairs, top_k=top_k, align_block_m=align_block_m, scales=scales, out_scale=out_scale,
    )  # fmt: skip
    tiles = expert_ids.numel() * arguments["TILES_PER_BLOCK"] * -(-out.shape[1] // config.block_n)
    crew = tma.multiprocessors(a.device) * config.programs_per_sm
    launch(sorted_up_kernel, (min(tiles, crew) if config.persistent else tiles,), arguments)


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
    """Every argument and option of the kernel, by name; no value of a tensor is read, so meta tensors do."""
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
        "QUANTISES": out_scale is not None,
        "LEAST_SCALE": LEAST_SCALE,
        "LARGEST": LARGEST_FP8,
        "PERSISTENT": config.persistent,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _weights_descriptor(weights: Tensor, config: UpConfig, *, is_scaled: bool) -> TensorDescriptor:
    """Where fused, over gates and ups as they alternate [2 * E, columns, K]: a box holds both, or one where scaled."""
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
        raise MoEExtError(f"block_n={config.block_n}: a tile that is quantized has the {GROUP} columns of one scale")
    tile = (config.block_m, config.block_n, config.block_k)
    tma.check_tile(tile, k, align_block_m, quantization, a.device, groups_of_columns=1)
