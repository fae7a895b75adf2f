"""The warp-specialized up projection (Gluon, sm_90): rows gathered by token, gate and up of one tile, SwiGLU.

Block-wise float8 is quantized 1 x 128 in the epilogue. The weights stay as the engine has them, [E, 2 * columns, K],
gate rows first. Four producer warps gather A with cp.async (Hopper's TMA cannot gather); one of their threads asks TMA
for the weights. A stage is full when the producer has seen its copies land and the bytes of TMA are there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.kernel_plans import WarpSpecializedUp
from sglang_moe_ext.kernels import dependent_launch
from sglang_moe_ext.kernels.warp_specialized import (
    HALF_M,
    WHOLE_M,
    drain,
    expert_at,
    first_block_here,
    first_tile,
    gather_rows,
    halves,
    is_tail,
    join_chain,
    load_box,
    pinned,
    silu_mul,
    store_box,
    store_columns,
    sync_warps,
    tile_after,
    tile_at,
)
from sglang_moe_ext.kernels.warp_specialized_launch import (
    BLOCK,
    LARGEST_FP8,
    LEAST_SCALE,
    box,
    launch,
    programs,
    scheme_of,
    strides,
)

FOLLOWS_TOKENS = ("pairs", "stride_csm", "stride_csn")
"""Arguments that change with the number of tokens, or with the plan's other kernel. One binary serves them all, so that
no request waits for a compiler."""


@gluon.jit  # type: ignore[untyped-decorator]
def gather_producer(  # type: ignore[no-untyped-def]
    a_ptr, w_desc, sorted_token_ids, expert_ids, first_m, tiles_m, tiles_n, columns, k_steps, pairs, stride_a, group_m,
    a_ring, w_ring, full, empty,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, TOP_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the ring with rows of A, as two halves of 64, and with BLOCK_N rows each of the gate and up weights."""
    DELAY: gl.constexpr = 2  # steps after which a stage's copies are awaited, and the stage is said to be full
    # A row of a stage is 128 bytes: 8 threads copy 16 each.
    layout: gl.constexpr = gl.BlockedLayout([1, BLOCK_K // 8], [4, 8], [4, 1], [1, 0])
    tiles = tiles_m * tiles_n
    n = 0
    ids_at = sorted_token_ids + gl.arange(0, HALF_M, gl.SliceLayout(1, layout))
    along_k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout)).expand_dims(0)
    m, tile_n = first_tile(tiles, tiles_m, tiles_n, group_m)
    expert = expert_at(expert_ids, first_m + m, tiles)
    top = gl.load(ids_at + (first_m + m) * WHOLE_M, mask=tiles > 0, other=pairs)
    low = gl.load(ids_at + (first_m + m) * WHOLE_M + HALF_M, mask=tiles > 0, other=pairs)
    is_last_half = is_tail(sorted_token_ids, first_m + m, tiles, pairs)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, tile_n = tile_at(tile, tiles_m, tiles_n, group_m)
        # Padding reads row 0: its results are never read.
        top_row = gl.where(top < pairs, top // TOP_K, 0).to(gl.int64) * stride_a
        low_row = gl.where(low < pairs, low // TOP_K, 0).to(gl.int64) * stride_a
        top_at = a_ptr + top_row.expand_dims(1) + along_k
        low_at = a_ptr + low_row.expand_dims(1) + along_k
        m_after, _ = tile_after(tile, tiles, tiles_m, tiles_n, group_m)
        expert_after = expert_at(expert_ids, first_m + m_after, tiles)
        is_last_half_after = is_tail(sorted_token_ids, first_m + m_after, tiles, pairs)
        top = gl.load(ids_at + (first_m + m_after) * WHOLE_M)
        low = gl.load(ids_at + (first_m + m_after) * WHOLE_M + HALF_M)
        w_row = expert * 2 * columns + tile_n * BLOCK_N
        steps = k_steps
        if expert < 0:
            steps = 0
        for k in range(steps):
            slot = (n + k) % STAGES
            mbarrier.wait(empty.index(slot), ((n + k) // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(slot), 2 * w_desc.block_type.nbytes)
            load_box(w_desc, [w_row, k * BLOCK_K], full.index(slot), w_ring.index(slot).slice(0, BLOCK_N, 0))
            load_box(
                w_desc, [w_row + columns, k * BLOCK_K], full.index(slot), w_ring.index(slot).slice(BLOCK_N, BLOCK_N, 0)
            )
            gather_rows(a_ring.index(slot).slice(0, HALF_M, 0), top_at + k * BLOCK_K)
            if not is_last_half:
                gather_rows(a_ring.index(slot).slice(HALF_M, HALF_M, 0), low_at + k * BLOCK_K)
            async_copy.commit_group()
            if n + k >= DELAY:
                async_copy.wait_group(DELAY)
                hopper.fence_async_shared()  # wgmma reads through another proxy than cp.async writes
                mbarrier.arrive(full.index((n + k - DELAY) % STAGES))
        n += steps
        expert = expert_after
        is_last_half = is_last_half_after
    async_copy.wait_group(0)
    hopper.fence_async_shared()
    for late in gl.static_range(DELAY):
        if n >= DELAY - late:
            mbarrier.arrive(full.index((n - DELAY + late) % STAGES))


@gluon.jit  # type: ignore[untyped-decorator]
def up_consumer(  # type: ignore[no-untyped-def]
    c_desc, a_scale_ptr, w_scale_ptr, sorted_token_ids, expert_ids, first_m, tiles_m, tiles_n, columns, k_steps, pairs,
    stride_asm, stride_bse, stride_bsn, group_m, a_ring, w_ring, full, empty, c_ring,
    WHICH: gl.constexpr, BLOCK_N: gl.constexpr, MMA_K: gl.constexpr, TOP_K: gl.constexpr, STAGES: gl.constexpr,
    IS_CHANNEL_SCALED: gl.constexpr,
):  # fmt: skip
    """16 bits, or float8 with a scale per row and per column: one product of 2 * BLOCK_N columns, scaled at the end."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 2 * BLOCK_N, MMA_K]
    )
    tiles = tiles_m * tiles_n
    n = 0
    m, tile_n = first_tile(tiles, tiles_m, tiles_n, group_m)
    expert = expert_at(expert_ids, first_m + m, tiles)
    is_last_half = is_tail(sorted_token_ids, first_m + m, tiles, pairs)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, tile_n = tile_at(tile, tiles_m, tiles_n, group_m)
        row = (first_m + m) * WHOLE_M + WHICH * HALF_M
        m_after, _ = tile_after(tile, tiles, tiles_m, tiles_n, group_m)
        expert_after = expert_at(expert_ids, first_m + m_after, tiles)
        is_last_half_after = is_tail(sorted_token_ids, first_m + m_after, tiles, pairs)
        if expert >= 0:
            is_padding = False
            if WHICH == 1:
                is_padding = is_last_half
            if not is_padding:
                acc = gl.zeros((HALF_M, 2 * BLOCK_N), gl.float32, mma)
                for k in range(k_steps):
                    slot = (n + k) % STAGES
                    mbarrier.wait(full.index(slot), (n + k) // STAGES & 1)
                    a = a_ring.index(slot).slice(WHICH * HALF_M, HALF_M, 0)
                    w = w_ring.index(slot).permute((1, 0))
                    acc = hopper.warpgroup_mma(a, w, acc, use_acc=k > 0, is_async=True)
                    acc = hopper.warpgroup_mma_wait(1, deps=(acc, a, w))[0]
                    if k > 0:  # the product before this one has been read
                        mbarrier.arrive(empty.index((n + k - 1) % STAGES))
                acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(empty.index((n + k_steps - 1) % STAGES))
                if IS_CHANNEL_SCALED:
                    ids = gl.load(sorted_token_ids + row + gl.arange(0, HALF_M, gl.SliceLayout(1, mma)))
                    a_scale = gl.load(a_scale_ptr + gl.where(ids < pairs, ids // TOP_K, 0) * stride_asm)
                    j = gl.arange(0, 2 * BLOCK_N, gl.SliceLayout(0, mma))
                    w_column = tile_n * BLOCK_N + j + gl.where(j < BLOCK_N, 0, columns - BLOCK_N)
                    w_scale = gl.load(w_scale_ptr + expert.to(gl.int64) * stride_bse + w_column * stride_bsn)
                    acc = acc * a_scale.expand_dims(1) * w_scale.expand_dims(0)
                gate, up = halves(acc, BLOCK_N)
                store_columns(c_desc, c_ring, WHICH, row, tile_n * BLOCK_N, silu_mul(gate, up))
            else:
                drain(n, k_steps, full, empty, STAGES)
            n += k_steps
        expert = expert_after
        is_last_half = is_last_half_after
    tma.store_wait(0)


@gluon.jit(do_not_specialize=FOLLOWS_TOKENS)  # type: ignore[untyped-decorator]
def up_kernel(  # type: ignore[no-untyped-def]
    a_ptr, w_desc, c_desc, a_scale_ptr, w_scale_ptr, sorted_token_ids, expert_ids, num_tokens_post_padded, pairs,
    columns, K, stride_a, stride_asm, stride_bse, stride_bsn, group_m,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, TOP_K: gl.constexpr, STAGES: gl.constexpr,
    IS_CHANNEL_SCALED: gl.constexpr, EXPERTS_ELSEWHERE: gl.constexpr, REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    tiles_n = columns // BLOCK_N
    k_steps = K // BLOCK_K
    MMA_K: gl.constexpr = BLOCK_K // 4  # a row of a stage is 128 bytes, a wgmma takes 32 of them
    a_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES, WHOLE_M, BLOCK_K], w_desc.layout)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES, 2 * BLOCK_N, BLOCK_K], w_desc.layout)
    c_ring = gl.allocate_shared_memory(c_desc.dtype, [4, HALF_M, BLOCK_N // 2], c_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=2)  # the rows of A, and the bytes of TMA
        mbarrier.init(empty.index(s), count=2)
    hopper.fence_async_shared()
    join_chain()
    tiles_m = gl.load(num_tokens_post_padded) // WHOLE_M
    first_m = 0
    if EXPERTS_ELSEWHERE:
        first_m = first_block_here(expert_ids, tiles_m)
    tiles_here = tiles_m - first_m
    first_m = min(first_m, max(tiles_m - 1, 0))
    gl.warp_specialize([
        (up_consumer, (c_desc, a_scale_ptr, w_scale_ptr, sorted_token_ids, expert_ids, first_m, tiles_here, tiles_n,
                       columns, k_steps, pairs, stride_asm, stride_bse, stride_bsn, group_m, a_ring, w_ring, full,
                       empty, c_ring, 0, BLOCK_N, MMA_K, TOP_K, STAGES, IS_CHANNEL_SCALED)),
        (up_consumer, (c_desc, a_scale_ptr, w_scale_ptr, sorted_token_ids, expert_ids, first_m, tiles_here, tiles_n,
                       columns, k_steps, pairs, stride_asm, stride_bse, stride_bsn, group_m, a_ring, w_ring, full,
                       empty, c_ring, 1, BLOCK_N, MMA_K, TOP_K, STAGES, IS_CHANNEL_SCALED)),
        (gather_producer, (a_ptr, w_desc, sorted_token_ids, expert_ids, first_m, tiles_here, tiles_n, columns, k_steps,
                           pairs, stride_a, group_m, a_ring, w_ring, full, empty, BLOCK_N, BLOCK_K, TOP_K, STAGES)),
    ], [4, 4], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


@gluon.jit  # type: ignore[untyped-decorator]
def up_block_consumer(  # type: ignore[no-untyped-def]
    c_desc, c_scale_ptr, a_scale_ptr, w_scale_ptr, sorted_token_ids, expert_ids, first_m, tiles_m, tiles_n, k_steps,
    pairs, stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk, stride_csm, stride_csn, group_m,
    a_ring, w_ring, full, empty, c_ring,
    WHICH: gl.constexpr, TOP_K: gl.constexpr, STAGES: gl.constexpr, LEAST: gl.constexpr,
    LARGEST: gl.constexpr,
):  # fmt: skip
    """Float8 in blocks of 128. One partial product is live: gate's is promoted before up's is asked for, while the
    other consumer has the tensor core."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    tiles = tiles_m * tiles_n
    n = 0
    # What the next tile needs is loaded during this one: a wait for each load would cost a step of products.
    m, tile_n = first_tile(tiles, tiles_m, tiles_n, group_m)
    expert = expert_at(expert_ids, first_m + m, tiles)
    is_last_half = is_tail(sorted_token_ids, first_m + m, tiles, pairs)
    ids_at = sorted_token_ids + WHICH * HALF_M + gl.arange(0, HALF_M, by_row)
    ids = gl.load(ids_at + (first_m + m) * WHOLE_M, mask=tiles > 0, other=pairs)
    a_scale_at = a_scale_ptr + gl.where(ids < pairs, ids // TOP_K, 0) * stride_asm
    w_scale_at = w_scale_ptr + max(expert, 0).to(gl.int64) * stride_bse + tile_n * stride_bsn
    a_scale = gl.load(a_scale_at)
    gate_scale = gl.load(w_scale_at)
    up_scale = gl.load(w_scale_at + tiles_n * stride_bsn)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, tile_n = tile_at(tile, tiles_m, tiles_n, group_m)
        row = (first_m + m) * WHOLE_M + WHICH * HALF_M
        m_after, n_after = tile_after(tile, tiles, tiles_m, tiles_n, group_m)
        expert_after = expert_at(expert_ids, first_m + m_after, tiles)
        is_last_half_after = is_tail(sorted_token_ids, first_m + m_after, tiles, pairs)
        ids_after = gl.load(ids_at + (first_m + m_after) * WHOLE_M)
        is_padding = False
        if WHICH == 1:
            is_padding = is_last_half
        gate = gl.zeros((HALF_M, 128), gl.float32, mma)
        up = gl.zeros((HALF_M, 128), gl.float32, mma)
        part = gl.zeros((HALF_M, 128), gl.float32, mma)
        never = k_steps < 0
        steps = k_steps
        if expert < 0:
            steps = 0
        if is_padding:
            drain(n, steps, full, empty, STAGES)
        else:
            for k in range(steps):
                after = min(k + 1, k_steps - 1)
                a_scale_after = gl.load(a_scale_at + after * stride_ask)
                gate_scale_after = gl.load(w_scale_at + after * stride_bsk)
                up_scale_after = gl.load(w_scale_at + tiles_n * stride_bsn + after * stride_bsk)
                slot = (n + k) % STAGES
                mbarrier.wait(full.index(slot), (n + k) // STAGES & 1)
                a = a_ring.index(slot).slice(WHICH * HALF_M, HALF_M, 0)
                w_gate = w_ring.index(slot).slice(0, 128, 0).permute((1, 0))
                w_up = w_ring.index(slot).slice(128, 128, 0).permute((1, 0))
                part = hopper.warpgroup_mma(a, w_gate, part, use_acc=never, is_async=True)
                part = hopper.warpgroup_mma_wait(0, deps=(part, a, w_gate))[0]
                gate = pinned(gate + part * (a_scale * gate_scale).expand_dims(1))
                part = hopper.warpgroup_mma(a, w_up, part, use_acc=never, is_async=True)
                part = hopper.warpgroup_mma_wait(0, deps=(part, a, w_up))[0]
                mbarrier.arrive(empty.index(slot))
                up += part * (a_scale * up_scale).expand_dims(1)
                a_scale = a_scale_after
                gate_scale = gate_scale_after
                up_scale = up_scale_after
        n += steps
        a_scale_at = a_scale_ptr + gl.where(ids_after < pairs, ids_after // TOP_K, 0) * stride_asm
        w_scale_at = w_scale_ptr + max(expert_after, 0).to(gl.int64) * stride_bse + n_after * stride_bsn
        a_scale = gl.load(a_scale_at)
        gate_scale = gl.load(w_scale_at)
        up_scale = gl.load(w_scale_at + tiles_n * stride_bsn)
        if not is_padding and steps > 0:
            inner = silu_mul(gate, up)
            top = gl.maximum(gl.max(gl.abs(inner), 1), LEAST)
            rows = row + gl.arange(0, HALF_M, by_row)
            gl.store(c_scale_ptr + rows.to(gl.int64) * stride_csm + tile_n * stride_csn, top / LARGEST)
            inner = inner * (LARGEST / top).expand_dims(1)
            tma.store_wait(0)
            sync_warps()  # one thread issued the store of the tile before and waited for it
            c_ring.index(WHICH).store(inner.to(c_desc.dtype))
            hopper.fence_async_shared()
            sync_warps()
            store_box(c_desc, [row, tile_n * 128], c_ring.index(WHICH))
        expert = expert_after
        is_last_half = is_last_half_after
    tma.store_wait(0)


@gluon.jit(do_not_specialize=FOLLOWS_TOKENS)  # type: ignore[untyped-decorator]
def up_block_kernel(  # type: ignore[no-untyped-def]
    a_ptr, w_desc, c_desc, c_scale_ptr, a_scale_ptr, w_scale_ptr, sorted_token_ids, expert_ids, num_tokens_post_padded,
    pairs, columns, K, stride_a, stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk, stride_csm, stride_csn,
    group_m, TOP_K: gl.constexpr, STAGES: gl.constexpr, LEAST: gl.constexpr, LARGEST: gl.constexpr,
    EXPERTS_ELSEWHERE: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    tiles_n = columns // 128
    k_steps = K // 128
    a_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES, WHOLE_M, 128], w_desc.layout)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES, 256, 128], w_desc.layout)
    c_ring = gl.allocate_shared_memory(c_desc.dtype, [2, HALF_M, 128], c_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=2)  # the rows of A, and the bytes of TMA
        mbarrier.init(empty.index(s), count=2)
    hopper.fence_async_shared()
    join_chain()
    tiles_m = gl.load(num_tokens_post_padded) // WHOLE_M
    first_m = 0
    if EXPERTS_ELSEWHERE:
        first_m = first_block_here(expert_ids, tiles_m)
    tiles_here = tiles_m - first_m
    first_m = min(first_m, max(tiles_m - 1, 0))
    gl.warp_specialize([
        (up_block_consumer, (c_desc, c_scale_ptr, a_scale_ptr, w_scale_ptr, sorted_token_ids, expert_ids, first_m,
                             tiles_here, tiles_n, k_steps, pairs, stride_asm, stride_ask, stride_bse, stride_bsn,
                             stride_bsk, stride_csm, stride_csn, group_m, a_ring, w_ring, full, empty, c_ring, 0,
                             TOP_K, STAGES, LEAST, LARGEST)),
        (up_block_consumer, (c_desc, c_scale_ptr, a_scale_ptr, w_scale_ptr, sorted_token_ids, expert_ids, first_m,
                             tiles_here, tiles_n, k_steps, pairs, stride_asm, stride_ask, stride_bse, stride_bsn,
                             stride_bsk, stride_csm, stride_csn, group_m, a_ring, w_ring, full, empty, c_ring, 1,
                             TOP_K, STAGES, LEAST, LARGEST)),
        (gather_producer, (a_ptr, w_desc, sorted_token_ids, expert_ids, first_m, tiles_here, tiles_n, columns, k_steps,
                           pairs, stride_a, group_m, a_ring, w_ring, full, empty, 128, 128, TOP_K, STAGES)),
    ], [4, 4], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


def launch_up(
    a: Tensor,
    weights: Tensor,
    out: Tensor,
    sorted_token_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    config: WarpSpecializedUp,
    *,
    pairs: int,
    top_k: int,
    a_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    experts_elsewhere: bool = False,
) -> None:
    """out [rows, columns] = silu(gate) * up of `a` [tokens, K], gathered into the order of sorted_token_ids.

    Args:
        weights: [E, 2 * columns, K], gate rows first.
        sorted_token_ids: int32, pair numbers in blocks of 128 rows per expert; padding is >= pairs.
        expert_ids: int32, one per block; tiles of expert -1 are skipped, their rows of `out` are not written.
        pairs: tokens * top_k.
        a_scale: float32 [tokens, K / 128], or [tokens, 1] per channel; any strides.
        weight_scale: float32 [E, 2 * columns / 128, K / 128], or [E, 2 * columns, 1] per channel.
        out_scale: float32 [rows, columns / 128], any strides (transposed storage loads fastest in the down kernel).
            Given for block-wise float8, and only there: `out` is float8_e4m3fn then, else 16 bits.
        experts_elsewhere: whether leading blocks may be of expert -1; they are then skipped at once.

    Rows of padding come to hold anything. Allocates nothing and does not wait, so a CUDA graph can hold it.

    Raises: MoEExtError where shapes, types or scales do not go together.
    """
    kernel, arguments = up_arguments(
        a, weights, out, sorted_token_ids, expert_ids, num_tokens_post_padded, config, pairs=pairs, top_k=top_k,
        a_scale=a_scale, weight_scale=weight_scale, out_scale=out_scale, experts_elsewhere=experts_elsewhere,
    )  # fmt: skip
    tiles = expert_ids.numel() * (out.shape[1] // BLOCK)
    launch(kernel, programs(a.device, tiles) if config.persistent else tiles, arguments)


def up_arguments(
    a: Tensor,
    weights: Tensor,
    out: Tensor,
    sorted_token_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    config: WarpSpecializedUp,
    *,
    pairs: int,
    top_k: int,
    a_scale: Tensor | None,
    weight_scale: Tensor | None,
    out_scale: Tensor | None,
    experts_elsewhere: bool,
) -> tuple[Any, dict[str, Any]]:
    """The kernel, and every argument and option of it by name. Reads no value of a tensor."""
    scheme = scheme_of(weights, weight_scale)
    _, _, k = weights.shape
    columns = out.shape[1]
    block_k = BLOCK // a.element_size()
    _check(a, weights, out, scheme, a_scale, out_scale)
    asm, ask = strides(a_scale, 2)
    bse, bsn, bsk = strides(weight_scale, 3)
    w_desc = box(weights.view(-1, k), BLOCK, block_k)
    common: dict[str, Any] = {
        "sorted_token_ids": sorted_token_ids,
        "expert_ids": expert_ids,
        "num_tokens_post_padded": num_tokens_post_padded,
        "pairs": pairs,
        "columns": columns,
        "K": k,
        "stride_a": a.stride(0),
        "stride_asm": asm,
        "stride_bse": bse,
        "stride_bsn": bsn,
        "group_m": config.group_m,
        "TOP_K": top_k,
        "STAGES": config.stages,
        "EXPERTS_ELSEWHERE": experts_elsewhere,
        "REGISTERS": 224,
        "PRODUCER_REGISTERS": 56,
        "num_warps": 4,
        **dependent_launch.OPTIONS,
    }
    if scheme == "block":
        csm, csn = strides(out_scale, 2)
        return up_block_kernel, {
            "a_ptr": a, "w_desc": w_desc, "c_desc": box(out, BLOCK // 2, BLOCK), "c_scale_ptr": out_scale,
            "a_scale_ptr": a_scale, "w_scale_ptr": weight_scale, **common, "stride_ask": ask, "stride_bsk": bsk,
            "stride_csm": csm, "stride_csn": csn, "LEAST": LEAST_SCALE, "LARGEST": LARGEST_FP8,
        }  # fmt: skip
    return up_kernel, {
        "a_ptr": a, "w_desc": w_desc, "c_desc": box(out, BLOCK // 2, BLOCK // 2), "a_scale_ptr": a_scale,
        "w_scale_ptr": weight_scale, **common, "BLOCK_N": BLOCK, "BLOCK_K": block_k,
        "IS_CHANNEL_SCALED": scheme == "channel",
    }  # fmt: skip


def _check(
    a: Tensor, weights: Tensor, out: Tensor, scheme: str, a_scale: Tensor | None, out_scale: Tensor | None
) -> None:
    _, rows_of_w, k = weights.shape
    columns, block_k = out.shape[1], BLOCK // a.element_size()
    if rows_of_w != 2 * columns or a.shape[1] != k or columns % BLOCK or k % block_k or not weights.is_contiguous():
        raise MoEExtError(
            f"a {tuple(a.shape)}, weights {tuple(weights.shape)}, out {tuple(out.shape)}: expected [tokens, K], "
            f"contiguous [E, 2 * columns, K] and [rows, columns], columns in whole {BLOCK} and K in whole {block_k}"
        )
    if a.stride(1) != 1 or a.stride(0) * a.element_size() % 16 or a.data_ptr() % 16:
        raise MoEExtError(f"a has strides {a.stride()}: expected contiguous rows, each aligned to 16 bytes")
    wanted = {"none": None, "block": (a.shape[0], k // BLOCK), "channel": (a.shape[0], 1)}[scheme]
    given = None if a_scale is None else tuple(a_scale.shape)
    if a.dtype != weights.dtype or given != wanted:
        raise MoEExtError(
            f"a {a.dtype} with scales {given}, weights {weights.dtype} scaled by {scheme}: expected one type, and "
            f"scales {wanted}"
        )
    quantizes = scheme == "block"
    sized = out_scale is not None and tuple(out_scale.shape) == (out.shape[0], columns // BLOCK)
    if quantizes != sized or (out.dtype == torch.float8_e4m3fn) != quantizes:
        raise MoEExtError(
            f"out {out.dtype} with out_scale {None if out_scale is None else tuple(out_scale.shape)}: expected "
            f"float8_e4m3fn and [rows, columns / {BLOCK}] for block-wise float8, 16 bits and None for other schemes"
        )
