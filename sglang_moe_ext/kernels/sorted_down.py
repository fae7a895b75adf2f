"""Grouped down GEMM over rows sorted by expert, through TMA (Hopper and newer). Reference: `reference.down`.

Launches allocate no memory and do not synchronize, so a CUDA graph can capture them.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sglang_moe_ext.core import Quantization
from sglang_moe_ext.kernel_plans import DownConfig
from sglang_moe_ext.kernels import tma
from sglang_moe_ext.kernels.launcher import launch
from sglang_moe_ext.kernels.quantize import Scales

# group_m depends on the configuration alone; specialization would compile equal binaries.
UNSPECIALIZED = ("group_m",)


@triton.jit(do_not_specialize=UNSPECIALIZED)  # type: ignore[untyped-decorator]
def sorted_down_kernel(  # type: ignore[no-untyped-def]
    a_desc, b_desc, c_desc, a_scale_ptr, b_scale_ptr, expert_ids_ptr, num_tokens_post_padded_ptr, N, K, group_m,
    stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, TILES_PER_BLOCK: tl.constexpr,
    SCALING: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, HALF_STORES: tl.constexpr,
    EXPERTS_ELSEWHERE: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.load(num_tokens_post_padded_ptr) // BLOCK_SIZE_M
    tiles_n = tl.cdiv(N, BLOCK_SIZE_N)
    if PERSISTENT:
        first_m = 0
        if EXPERTS_ELSEWHERE:
            first_m = _first_block_here(expert_ids_ptr, tiles_m // TILES_PER_BLOCK) * TILES_PER_BLOCK
            tiles_m -= first_m
        # Flattened: the next tile's loads overlap this tile's store.
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
            tile_m, tile_n = position_of(tile, tiles_m, tiles_n, group_m)
            row = (first_m + tile_m) * BLOCK_SIZE_M
            expert = tl.load(expert_ids_ptr + (first_m + tile_m) // TILES_PER_BLOCK)
            _multiply(
                a_desc, b_desc, c_desc, a_scale_ptr, b_scale_ptr, expert, row, tile_n * BLOCK_SIZE_N, N, K,
                stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk,
                BLOCK_SIZE_M, BLOCK_SIZE_N, BLOCK_SIZE_K, SCALING, GROUP_N, GROUP_K, HALF_STORES,
            )  # fmt: skip
    else:
        if tl.program_id(0) >= tiles_m * tiles_n:
            return
        tile_m, tile_n = position_of(tl.program_id(0), tiles_m, tiles_n, group_m)
        row = tile_m * BLOCK_SIZE_M
        expert = tl.load(expert_ids_ptr + tile_m // TILES_PER_BLOCK)
        if EXPERTS_ELSEWHERE:  # noqa: SIM102 - a constexpr: without expert parallelism the test is not compiled
            if expert < 0:
                return
        _multiply(
            a_desc, b_desc, c_desc, a_scale_ptr, b_scale_ptr, expert, row, tile_n * BLOCK_SIZE_N, N, K,
            stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk,
            BLOCK_SIZE_M, BLOCK_SIZE_N, BLOCK_SIZE_K, SCALING, GROUP_N, GROUP_K, HALF_STORES,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    a_desc, b_desc, c_desc, a_scale_ptr, b_scale_ptr, expert, row, column, N, K,
    stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
    SCALING: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, HALF_STORES: tl.constexpr,
):  # fmt: skip
    """One tile of C. Out of bounds (K, N, expert -1) TMA reads zeros and stores nothing."""
    if SCALING != "none":
        # A pointer load: expert -1 would read outside the scales.
        b_scale_ptr += tl.maximum(expert, 0).to(tl.int64) * stride_bse
    if SCALING == "block":
        a_scale_ptrs = a_scale_ptr + (row + tl.arange(0, BLOCK_SIZE_M)).to(tl.int64) * stride_asm
        if BLOCK_SIZE_N > GROUP_N:
            left, right = _block_scaled_halves(
                a_desc, b_desc, a_scale_ptrs, b_scale_ptr, expert, row, column, N, K,
                stride_ask, stride_bsn, stride_bsk, BLOCK_SIZE_M, GROUP_N, BLOCK_SIZE_K, GROUP_K,
            )  # fmt: skip
            c_desc.store([row, column], left.to(c_desc.dtype))
            c_desc.store([row, column + GROUP_N], right.to(c_desc.dtype))
        else:
            acc = _block_scaled(
                a_desc, b_desc, a_scale_ptrs, b_scale_ptr + column // GROUP_N * stride_bsn, expert, row, column, K,
                stride_ask, stride_bsk, BLOCK_SIZE_M, BLOCK_SIZE_N, BLOCK_SIZE_K, GROUP_K,
            )  # fmt: skip
            store_tile(
                c_desc, acc, a_scale_ptr, b_scale_ptr, row, column, N, stride_asm, stride_bsn,
                BLOCK_SIZE_M, BLOCK_SIZE_N, "none", HALF_STORES,
            )  # fmt: skip
    else:
        acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), tl.float32)
        for k in tl.range(0, K, BLOCK_SIZE_K):
            a = a_desc.load([row, k])
            b = b_desc.load([expert, column, k]).reshape(BLOCK_SIZE_N, BLOCK_SIZE_K)
            acc = tl.dot(a, b.T, acc)
        store_tile(
            c_desc, acc, a_scale_ptr, b_scale_ptr, row, column, N, stride_asm, stride_bsn,
            BLOCK_SIZE_M, BLOCK_SIZE_N, SCALING, HALF_STORES,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _block_scaled(  # type: ignore[no-untyped-def]
    a_desc, b_desc, a_scale_ptrs, b_scale_ptr, expert, row, column, K, stride_ask, stride_bsk,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, GROUP_K: tl.constexpr,
):  # fmt: skip
    """One scale of B a step, multiplied into the scales of A: BLOCK_SIZE_M products instead of one for each element."""
    acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), tl.float32)
    for k in tl.range(0, K, BLOCK_SIZE_K):
        a = a_desc.load([row, k])
        b = b_desc.load([expert, column, k]).reshape(BLOCK_SIZE_N, BLOCK_SIZE_K)
        group = k // GROUP_K
        scale = tl.load(a_scale_ptrs + group * stride_ask) * tl.load(b_scale_ptr + group * stride_bsk)
        acc += tl.dot(a, b.T) * scale[:, None]
    return acc


@triton.jit  # type: ignore[untyped-decorator]
def _block_scaled_halves(  # type: ignore[no-untyped-def]
    a_desc, b_desc, a_scale_ptrs, b_scale_ptr, expert, row, column, N, K, stride_ask, stride_bsn, stride_bsk,
    BLOCK_SIZE_M: tl.constexpr, HALF_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, GROUP_K: tl.constexpr,
):  # fmt: skip
    """A tile across two scales of B, as two halves that share A; only one partial product is held at a time."""
    left_group = column // HALF_N
    right_group = tl.minimum(left_group + 1, tl.cdiv(N, HALF_N) - 1)
    left = tl.zeros((BLOCK_SIZE_M, HALF_N), tl.float32)
    right = tl.zeros((BLOCK_SIZE_M, HALF_N), tl.float32)
    for k in tl.range(0, K, BLOCK_SIZE_K):
        a = a_desc.load([row, k])
        b_left = b_desc.load([expert, column, k]).reshape(HALF_N, BLOCK_SIZE_K)
        b_right = b_desc.load([expert, column + HALF_N, k]).reshape(HALF_N, BLOCK_SIZE_K)
        group = k // GROUP_K
        a_scale = tl.load(a_scale_ptrs + group * stride_ask)
        left_scale = a_scale * tl.load(b_scale_ptr + left_group * stride_bsn + group * stride_bsk)
        right_scale = a_scale * tl.load(b_scale_ptr + right_group * stride_bsn + group * stride_bsk)
        left += tl.dot(a, b_left.T) * left_scale[:, None]
        right += tl.dot(a, b_right.T) * right_scale[:, None]
    return left, right


@triton.jit  # type: ignore[untyped-decorator]
def store_tile(  # type: ignore[no-untyped-def]
    c_desc, acc, a_scale_ptr, b_scale_ptr, row, column, N, stride_asm, stride_bsn,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, SCALING: tl.constexpr, HALF_STORES: tl.constexpr,
):  # fmt: skip
    """Store through shared memory. Two halves need half the staging buffer, which can free a pipeline stage."""
    if HALF_STORES:
        HALF_N: tl.constexpr = BLOCK_SIZE_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_SIZE_M, 2, HALF_N)), (0, 2, 1)))
        left = scaled(left, a_scale_ptr, b_scale_ptr, row, column, N, stride_asm, stride_bsn, SCALING)
        c_desc.store([row, column], left.to(c_desc.dtype))
        right = scaled(right, a_scale_ptr, b_scale_ptr, row, column + HALF_N, N, stride_asm, stride_bsn, SCALING)
        c_desc.store([row, column + HALF_N], right.to(c_desc.dtype))
    else:
        acc = scaled(acc, a_scale_ptr, b_scale_ptr, row, column, N, stride_asm, stride_bsn, SCALING)
        c_desc.store([row, column], acc.to(c_desc.dtype))


@triton.jit  # type: ignore[untyped-decorator]
def scaled(  # type: ignore[no-untyped-def]
    acc, a_scale_ptr, b_scale_ptr, row, column, N, stride_asm, stride_bsn, SCALING: tl.constexpr
):  # fmt: skip
    """Apply scales that are constant along K."""
    if SCALING == "channel":
        rows = (row + tl.arange(0, acc.shape[0])).to(tl.int64)
        columns = column + tl.arange(0, acc.shape[1])
        a_scale = tl.load(a_scale_ptr + rows * stride_asm)
        b_scale = tl.load(b_scale_ptr + columns * stride_bsn, mask=columns < N, other=0.0)
        return acc * a_scale[:, None] * b_scale[None, :]
    elif SCALING == "tensor":
        return acc * (tl.load(a_scale_ptr) * tl.load(b_scale_ptr))
    else:
        return acc


@triton.jit
def position_of(tile, tiles_m, tiles_n, group_m):  # type: ignore[no-untyped-def]
    """Row and column of a tile. Tiles run down group_m tile rows before the next column, whose weights stay in L2."""
    first_m = tile // (group_m * tiles_n) * group_m
    height = min(tiles_m - first_m, group_m)
    within = tile % (group_m * tiles_n)
    return first_m + within % height, within // height


@triton.jit
def _first_block_here(expert_ids_ptr, blocks):  # type: ignore[no-untyped-def]
    """First block of this rank's experts. The engine sorts other ranks' pairs first; later ones only cost time."""
    CHUNK: tl.constexpr = 1024
    first = blocks
    for start in tl.range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        expert = tl.load(expert_ids_ptr + block, mask=block < blocks, other=-1)
        first = min(first, tl.min(tl.where(expert >= 0, block, blocks)))
    return first


def launch_down(
    a: Tensor,
    weights: Tensor,
    out: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    config: DownConfig,
    *,
    align_block_m: int,
    scales: Scales | None = None,
    experts_elsewhere: bool = False,
) -> None:
    """Write out = each row of `a` times the weights of its block's expert.

    Args:
        a: [rows, K], in the order of sorted_token_ids. Padding rows may hold any values.
        weights: [experts, N, K].
        out: [rows, N]. Padding rows, rows of expert -1 and rows past num_tokens_post_padded are undefined afterwards.
        align_block_m: rows of a block of the sort.
        scales: float8 scales; `scales.activations` has one row for each row of `a`, or is one number.
        experts_elsewhere: skip blocks of expert -1, which belong to other ranks.

    Raises:
        MoEExtError: TMA, tile, scales and alignment do not fit together.
    """
    arguments = kernel_arguments(
        a,
        weights,
        out,
        expert_ids,
        num_tokens_post_padded,
        config,
        align_block_m=align_block_m,
        scales=scales,
        experts_elsewhere=experts_elsewhere,
    )
    tiles = expert_ids.numel() * arguments["TILES_PER_BLOCK"] * -(-weights.shape[1] // config.block_n)
    launch(sorted_down_kernel, tma.grid(config, tiles, a.device), arguments)


def kernel_arguments(
    a: Tensor,
    weights: Tensor,
    out: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    config: DownConfig,
    *,
    align_block_m: int,
    scales: Scales | None,
    experts_elsewhere: bool,
) -> dict[str, Any]:
    """Every argument and option of the kernel by name. Reads no tensor values: meta tensors work."""
    _, columns, k = weights.shape
    quantization = Quantization() if scales is None else scales.quantization
    group_n, group_k = quantization.block_shape or (0, 0)
    tile = (config.block_m, config.block_n, config.block_k)
    tma.check_tensors(a, weights, out)
    tma.check_tile(tile, k, align_block_m, quantization, a.device, groups_of_columns=2)
    two_groups = 0 < group_n < config.block_n
    stored_n = config.block_n // 2 if two_groups or config.half_stores else config.block_n
    a_scale, b_scale = (None, None) if scales is None else (scales.activations, scales.weights)
    return {
        "a_desc": tma.descriptor(a, config.block_m, config.block_k),
        "b_desc": tma.descriptor(weights, 1, group_n if two_groups else config.block_n, config.block_k),
        "c_desc": tma.descriptor(out, config.block_m, stored_n),
        "a_scale_ptr": a_scale,
        "b_scale_ptr": b_scale,
        "expert_ids_ptr": expert_ids,
        "num_tokens_post_padded_ptr": num_tokens_post_padded,
        "N": columns,
        "K": k,
        "group_m": config.group_m,
        **tma.scale_strides(a_scale, b_scale),
        "BLOCK_SIZE_M": config.block_m,
        "BLOCK_SIZE_N": config.block_n,
        "BLOCK_SIZE_K": config.block_k,
        "TILES_PER_BLOCK": align_block_m // config.block_m,
        "SCALING": tma.scaling_of(quantization),
        "GROUP_N": group_n,
        "GROUP_K": group_k,
        "HALF_STORES": config.half_stores,
        "EXPERTS_ELSEWHERE": experts_elsewhere,
        "PERSISTENT": config.persistent,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
