"""Device code of the up projection: A gathered by token, B and C through TMA, the activation in the epilogue or not.

`sorted_up.py` launches it, and says what it computes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_moe_ext.kernels.sorted_down_kernel import UNSPECIALISED, position_of, store_tile


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
