"""The warp-specialized down projection (Gluon, sm_90) of rows sorted by expert: A, weights and results through TMA.

Three kernels: tiles of 128x256 for 16 bits and per-channel float8; 128x256 as two halves for block-wise float8, each
half with its own scale of the weights; and, for block-wise float8, 128x128 with one consumer, two CTAs a
multiprocessor. Weights [E, N, K] are read as [E * N, K]: a tile that passes the end of its expert's rows computes
columns that the store clips.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.kernel_plans import WarpSpecializedDown
from sglang_moe_ext.kernels import dependent_launch
from sglang_moe_ext.kernels.warp_specialized import (
    HALF_M,
    WHOLE_M,
    drain,
    expert_at,
    first_block_here,
    first_tile,
    halves,
    is_tail,
    join_chain,
    load_box,
    pinned,
    store_columns,
    tile_after,
    tile_at,
)
from sglang_moe_ext.kernels.warp_specialized_launch import (
    BLOCK,
    box,
    launch,
    programs,
    scheme_of,
    strides,
)

FOLLOWS_TOKENS = ("pairs", "stride_asm", "stride_ask")
"""Arguments that change with the number of tokens, or with the plan's other kernel. One binary serves them all, so that
no request waits for a compiler."""


@gluon.jit  # type: ignore[untyped-decorator]
def tma_producer(  # type: ignore[no-untyped-def]
    a_desc, b_desc, expert_ids, first_m, tiles_m, tiles_n, N, k_steps, group_m, a_ring, b_ring, full, empty,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the ring with tiles of A and of the weights."""
    tiles = tiles_m * tiles_n
    n = 0
    m, tile_n = first_tile(tiles, tiles_m, tiles_n, group_m)
    expert = expert_at(expert_ids, first_m + m, tiles)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, tile_n = tile_at(tile, tiles_m, tiles_n, group_m)
        m_after, _ = tile_after(tile, tiles, tiles_m, tiles_n, group_m)
        expert_after = expert_at(expert_ids, first_m + m_after, tiles)
        if expert >= 0:
            b_row = expert * N + tile_n * BLOCK_N
            for k in range(k_steps):
                slot = (n + k) % STAGES
                mbarrier.wait(empty.index(slot), ((n + k) // STAGES & 1) ^ 1)
                mbarrier.expect(full.index(slot), a_desc.block_type.nbytes + b_desc.block_type.nbytes)
                load_box(a_desc, [(first_m + m) * WHOLE_M, k * BLOCK_K], full.index(slot), a_ring.index(slot))
                load_box(b_desc, [b_row, k * BLOCK_K], full.index(slot), b_ring.index(slot))
            n += k_steps
        expert = expert_after


@gluon.jit  # type: ignore[untyped-decorator]
def down_consumer(  # type: ignore[no-untyped-def]
    c_desc, a_scale_ptr, w_scale_ptr, sorted_token_ids, expert_ids, first_m, tiles_m, tiles_n, N, k_steps, pairs,
    stride_asm, stride_bse, stride_bsn, group_m, a_ring, b_ring, full, empty, c_ring,
    WHICH: gl.constexpr, MMA_K: gl.constexpr, STAGES: gl.constexpr,
    IS_CHANNEL_SCALED: gl.constexpr,
):  # fmt: skip
    """16 bits, or float8 with one scale per row and per column: one product of 256 columns, scaled at the end."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, MMA_K])
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
                acc = gl.zeros((HALF_M, 256), gl.float32, mma)
                for k in range(k_steps):
                    slot = (n + k) % STAGES
                    mbarrier.wait(full.index(slot), (n + k) // STAGES & 1)
                    a = a_ring.index(slot).slice(WHICH * HALF_M, HALF_M, 0)
                    b = b_ring.index(slot).permute((1, 0))
                    acc = hopper.warpgroup_mma(a, b, acc, use_acc=k > 0, is_async=True)
                    acc = hopper.warpgroup_mma_wait(1, deps=(acc, a, b))[0]
                    if k > 0:  # the product before this one has been read
                        mbarrier.arrive(empty.index((n + k - 1) % STAGES))
                acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(empty.index((n + k_steps - 1) % STAGES))
                column = tile_n * 256
                if IS_CHANNEL_SCALED:
                    rows = row + gl.arange(0, HALF_M, gl.SliceLayout(1, mma))
                    columns = column + gl.arange(0, 256, gl.SliceLayout(0, mma))
                    a_scale = gl.load(a_scale_ptr + rows * stride_asm)
                    w_at = w_scale_ptr + expert.to(gl.int64) * stride_bse + columns * stride_bsn
                    w_scale = gl.load(w_at, mask=columns < N, other=0.0)
                    acc = acc * a_scale.expand_dims(1) * w_scale.expand_dims(0)
                left, right = halves(acc, 128)
                store_columns(c_desc, c_ring, WHICH, row, column, left)
                store_columns(c_desc, c_ring, WHICH, row, column + 128, right)
            else:
                drain(n, k_steps, full, empty, STAGES)
            n += k_steps
        expert = expert_after
        is_last_half = is_last_half_after
    tma.store_wait(0)


@gluon.jit(do_not_specialize=FOLLOWS_TOKENS)  # type: ignore[untyped-decorator]
def down_kernel(  # type: ignore[no-untyped-def]
    a_desc, b_desc, c_desc, a_scale_ptr, w_scale_ptr, sorted_token_ids, expert_ids, num_tokens_post_padded, pairs, N, K,
    stride_asm, stride_bse, stride_bsn, group_m,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    IS_CHANNEL_SCALED: gl.constexpr, EXPERTS_ELSEWHERE: gl.constexpr, REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    tiles_n = (N + 255) // 256
    k_steps = (K + BLOCK_K - 1) // BLOCK_K
    MMA_K: gl.constexpr = BLOCK_K // 4  # a row of a stage is 128 bytes, a wgmma takes 32 of them
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES, WHOLE_M, BLOCK_K], a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES, 256, BLOCK_K], b_desc.layout)
    c_ring = gl.allocate_shared_memory(c_desc.dtype, [4, HALF_M, 64], c_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
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
        (down_consumer, (c_desc, a_scale_ptr, w_scale_ptr, sorted_token_ids, expert_ids, first_m, tiles_here, tiles_n,
                         N, k_steps, pairs, stride_asm, stride_bse, stride_bsn, group_m, a_ring, b_ring, full, empty,
                         c_ring, 0, MMA_K, STAGES, IS_CHANNEL_SCALED)),
        (down_consumer, (c_desc, a_scale_ptr, w_scale_ptr, sorted_token_ids, expert_ids, first_m, tiles_here, tiles_n,
                         N, k_steps, pairs, stride_asm, stride_bse, stride_bsn, group_m, a_ring, b_ring, full, empty,
                         c_ring, 1, MMA_K, STAGES, IS_CHANNEL_SCALED)),
        (tma_producer, (a_desc, b_desc, expert_ids, first_m, tiles_here, tiles_n, N, k_steps, group_m, a_ring, b_ring,
                        full, empty, 256, BLOCK_K, STAGES)),
    ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


@gluon.jit  # type: ignore[untyped-decorator]
def half_row(tile_m, is_half, WHICH: gl.constexpr):  # type: ignore[no-untyped-def]
    """The first row that consumer WHICH multiplies: in a tail both take the first 64."""
    row = tile_m * WHOLE_M + WHICH * HALF_M
    if is_half:
        row = tile_m * WHOLE_M
    return row


@gluon.jit  # type: ignore[untyped-decorator]
def down_block_consumer(  # type: ignore[no-untyped-def]
    c_desc, a_scale_ptr, w_scale_ptr, sorted_token_ids, expert_ids, first_m, tiles_m, tiles_n, N, k_steps, pairs,
    stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk, group_m, a_ring, b_ring, full, empty, c_ring,
    WHICH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """128x256 as two halves of 128 columns: 128 registers of results and one partial of 64."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    tiles = tiles_m * tiles_n
    n = 0
    # What the next tile needs is loaded during this one: a wait for each load would cost a step of products.
    m, tile_n = first_tile(tiles, tiles_m, tiles_n, group_m)
    expert = expert_at(expert_ids, first_m + m, tiles)
    is_half = is_tail(sorted_token_ids, first_m + m, tiles, pairs)
    groups_n = (N + 127) // 128
    a_rows = a_scale_ptr + gl.arange(0, HALF_M, gl.SliceLayout(1, mma)) * stride_asm
    a_scale_at = a_rows + half_row(first_m + m, is_half, WHICH) * stride_asm
    w_scale_at = w_scale_ptr + max(expert, 0).to(gl.int64) * stride_bse + 2 * tile_n * stride_bsn
    to_right = min(1, groups_n - 1 - 2 * tile_n) * stride_bsn
    a_scale = gl.load(a_scale_at)
    left_scale = gl.load(w_scale_at)
    right_scale = gl.load(w_scale_at + to_right)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, tile_n = tile_at(tile, tiles_m, tiles_n, group_m)
        row = half_row(first_m + m, is_half, WHICH)
        m_after, n_after = tile_after(tile, tiles, tiles_m, tiles_n, group_m)
        expert_after = expert_at(expert_ids, first_m + m_after, tiles)
        is_half_after = is_tail(sorted_token_ids, first_m + m_after, tiles, pairs)
        left = gl.zeros((HALF_M, 128), gl.float32, mma)
        right = gl.zeros((HALF_M, 128), gl.float32, mma)
        part = gl.zeros((HALF_M, 128), gl.float32, mma)
        never = k_steps < 0
        steps = k_steps
        if expert < 0:
            steps = 0
        if is_half:  # each consumer multiplies the first 64 rows with its half of the columns
            for k in range(steps):
                after = min(k + 1, k_steps - 1)
                a_scale_after = gl.load(a_scale_at + after * stride_ask)
                left_scale_after = gl.load(w_scale_at + WHICH * to_right + after * stride_bsk)
                slot = (n + k) % STAGES
                mbarrier.wait(full.index(slot), (n + k) // STAGES & 1)
                a = a_ring.index(slot).slice(0, HALF_M, 0)
                b = b_ring.index(slot).slice(WHICH * 128, 128, 0).permute((1, 0))
                part = hopper.warpgroup_mma(a, b, part, use_acc=never, is_async=True)
                part = hopper.warpgroup_mma_wait(0, deps=(part, a, b))[0]
                mbarrier.arrive(empty.index(slot))
                left += part * (a_scale * (left_scale if WHICH == 0 else right_scale)).expand_dims(1)
                a_scale = a_scale_after
                if WHICH == 0:
                    left_scale = left_scale_after
                else:
                    right_scale = left_scale_after
        else:
            for k in range(steps):
                after = min(k + 1, k_steps - 1)
                a_scale_after = gl.load(a_scale_at + after * stride_ask)
                left_scale_after = gl.load(w_scale_at + after * stride_bsk)
                right_scale_after = gl.load(w_scale_at + to_right + after * stride_bsk)
                slot = (n + k) % STAGES
                mbarrier.wait(full.index(slot), (n + k) // STAGES & 1)
                a = a_ring.index(slot).slice(WHICH * HALF_M, HALF_M, 0)
                b_left = b_ring.index(slot).slice(0, 128, 0).permute((1, 0))
                b_right = b_ring.index(slot).slice(128, 128, 0).permute((1, 0))
                part = hopper.warpgroup_mma(a, b_left, part, use_acc=never, is_async=True)
                part = hopper.warpgroup_mma_wait(0, deps=(part, a, b_left))[0]
                left = pinned(left + part * (a_scale * left_scale).expand_dims(1))
                part = hopper.warpgroup_mma(a, b_right, part, use_acc=never, is_async=True)
                part = hopper.warpgroup_mma_wait(0, deps=(part, a, b_right))[0]
                mbarrier.arrive(empty.index(slot))
                right += part * (a_scale * right_scale).expand_dims(1)
                a_scale = a_scale_after
                left_scale = left_scale_after
                right_scale = right_scale_after
        n += steps
        a_scale_at = a_rows + half_row(first_m + m_after, is_half_after, WHICH) * stride_asm
        w_scale_at = w_scale_ptr + max(expert_after, 0).to(gl.int64) * stride_bse + 2 * n_after * stride_bsn
        to_right = min(1, groups_n - 1 - 2 * n_after) * stride_bsn
        a_scale = gl.load(a_scale_at)
        left_scale = gl.load(w_scale_at)
        right_scale = gl.load(w_scale_at + to_right)
        if steps > 0:
            if is_half:
                store_columns(c_desc, c_ring, WHICH, row, tile_n * 256 + WHICH * 128, left)
            else:
                store_columns(c_desc, c_ring, WHICH, row, tile_n * 256, left)
                store_columns(c_desc, c_ring, WHICH, row, tile_n * 256 + 128, right)
        expert = expert_after
        is_half = is_half_after
    tma.store_wait(0)


@gluon.jit(do_not_specialize=FOLLOWS_TOKENS)  # type: ignore[untyped-decorator]
def down_block_kernel(  # type: ignore[no-untyped-def]
    a_desc, b_desc, c_desc, a_scale_ptr, w_scale_ptr, sorted_token_ids, expert_ids, num_tokens_post_padded, pairs, N, K,
    stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk, group_m,
    STAGES: gl.constexpr, EXPERTS_ELSEWHERE: gl.constexpr,
    REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    tiles_n = (N + 255) // 256
    k_steps = K // 128
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES, WHOLE_M, 128], a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES, 256, 128], b_desc.layout)
    c_ring = gl.allocate_shared_memory(c_desc.dtype, [4, HALF_M, 64], c_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
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
        (down_block_consumer, (c_desc, a_scale_ptr, w_scale_ptr, sorted_token_ids, expert_ids, first_m, tiles_here,
                               tiles_n, N, k_steps, pairs, stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk,
                               group_m, a_ring, b_ring, full, empty, c_ring, 0, STAGES)),
        (down_block_consumer, (c_desc, a_scale_ptr, w_scale_ptr, sorted_token_ids, expert_ids, first_m, tiles_here,
                               tiles_n, N, k_steps, pairs, stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk,
                               group_m, a_ring, b_ring, full, empty, c_ring, 1, STAGES)),
        (tma_producer, (a_desc, b_desc, expert_ids, first_m, tiles_here, tiles_n, N, k_steps, group_m, a_ring, b_ring,
                        full, empty, 256, 128, STAGES)),
    ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


@gluon.jit  # type: ignore[untyped-decorator]
def pair_consumer(  # type: ignore[no-untyped-def]
    c_desc, a_scale_ptr, w_scale_ptr, sorted_token_ids, expert_ids, first_m, tiles_m, tiles_n, k_steps, pairs,
    stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk, group_m, a_ring, b_ring, full, empty, c_ring,
    STAGES: gl.constexpr,
):  # fmt: skip
    """All 128 rows in one warpgroup, as two halves that share one partial of 64 registers."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    tiles = tiles_m * tiles_n
    n = 0
    # What the next tile needs is loaded during this one: a wait for each load would cost a step of products.
    m, tile_n = first_tile(tiles, tiles_m, tiles_n, group_m)
    expert = expert_at(expert_ids, first_m + m, tiles)
    is_half = is_tail(sorted_token_ids, first_m + m, tiles, pairs)
    a_rows = a_scale_ptr + gl.arange(0, HALF_M, gl.SliceLayout(1, mma)) * stride_asm
    a_scale_at = a_rows + (first_m + m) * WHOLE_M * stride_asm
    w_scale_at = w_scale_ptr + max(expert, 0).to(gl.int64) * stride_bse + tile_n * stride_bsn
    top_scale = gl.load(a_scale_at)
    low_scale = gl.load(a_scale_at + HALF_M * stride_asm)
    w_scale = gl.load(w_scale_at)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, tile_n = tile_at(tile, tiles_m, tiles_n, group_m)
        row = (first_m + m) * WHOLE_M
        m_after, n_after = tile_after(tile, tiles, tiles_m, tiles_n, group_m)
        expert_after = expert_at(expert_ids, first_m + m_after, tiles)
        is_half_after = is_tail(sorted_token_ids, first_m + m_after, tiles, pairs)
        top = gl.zeros((HALF_M, 128), gl.float32, mma)
        low = gl.zeros((HALF_M, 128), gl.float32, mma)
        part = gl.zeros((HALF_M, 128), gl.float32, mma)
        never = k_steps < 0
        steps = k_steps
        if expert < 0:
            steps = 0
        for k in range(steps):
            after = min(k + 1, k_steps - 1)
            top_scale_after = gl.load(a_scale_at + after * stride_ask)
            low_scale_after = gl.load(a_scale_at + HALF_M * stride_asm + after * stride_ask)
            w_scale_after = gl.load(w_scale_at + after * stride_bsk)
            slot = (n + k) % STAGES
            mbarrier.wait(full.index(slot), (n + k) // STAGES & 1)
            a_top = a_ring.index(slot).slice(0, HALF_M, 0)
            a_low = a_ring.index(slot).slice(HALF_M, HALF_M, 0)
            b = b_ring.index(slot).permute((1, 0))
            part = hopper.warpgroup_mma(a_top, b, part, use_acc=never, is_async=True)
            part = hopper.warpgroup_mma_wait(0, deps=(part, a_top, b))[0]
            top = pinned(top + part * (top_scale * w_scale).expand_dims(1))
            if not is_half:
                part = hopper.warpgroup_mma(a_low, b, part, use_acc=never, is_async=True)
                part = hopper.warpgroup_mma_wait(0, deps=(part, a_low, b))[0]
            mbarrier.arrive(empty.index(slot))
            low += part * (low_scale * w_scale).expand_dims(1)
            top_scale = top_scale_after
            low_scale = low_scale_after
            w_scale = w_scale_after
        n += steps
        a_scale_at = a_rows + (first_m + m_after) * WHOLE_M * stride_asm
        w_scale_at = w_scale_ptr + max(expert_after, 0).to(gl.int64) * stride_bse + n_after * stride_bsn
        top_scale = gl.load(a_scale_at)
        low_scale = gl.load(a_scale_at + HALF_M * stride_asm)
        w_scale = gl.load(w_scale_at)
        if steps > 0:
            store_columns(c_desc, c_ring, 0, row, tile_n * 128, top)
            if not is_half:
                store_columns(c_desc, c_ring, 0, row + HALF_M, tile_n * 128, low)
        expert = expert_after
        is_half = is_half_after
    tma.store_wait(0)


@gluon.jit(do_not_specialize=FOLLOWS_TOKENS)  # type: ignore[untyped-decorator]
def down_pair_kernel(  # type: ignore[no-untyped-def]
    a_desc, b_desc, c_desc, a_scale_ptr, w_scale_ptr, sorted_token_ids, expert_ids, num_tokens_post_padded, pairs, N, K,
    stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk, group_m,
    STAGES: gl.constexpr, EXPERTS_ELSEWHERE: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """256 threads of 128 registers (232 and 24 after setmaxnreg) and at most 113 KB of shared memory: two CTAs fit.

    One CTA's promotion and stores are under the other's products, with no barrier between them.
    """
    tiles_n = (N + 127) // 128
    k_steps = K // 128
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES, WHOLE_M, 128], a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES, 128, 128], b_desc.layout)
    c_ring = gl.allocate_shared_memory(c_desc.dtype, [2, HALF_M, 64], c_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    hopper.fence_async_shared()
    join_chain()
    tiles_m = gl.load(num_tokens_post_padded) // WHOLE_M
    first_m = 0
    if EXPERTS_ELSEWHERE:
        first_m = first_block_here(expert_ids, tiles_m)
    tiles_here = tiles_m - first_m
    first_m = min(first_m, max(tiles_m - 1, 0))
    gl.warp_specialize([
        (pair_consumer, (c_desc, a_scale_ptr, w_scale_ptr, sorted_token_ids, expert_ids, first_m, tiles_here, tiles_n,
                         k_steps, pairs, stride_asm, stride_ask, stride_bse, stride_bsn, stride_bsk, group_m,
                         a_ring, b_ring, full, empty, c_ring, STAGES)),
        (tma_producer, (a_desc, b_desc, expert_ids, first_m, tiles_here, tiles_n, N, k_steps, group_m, a_ring, b_ring,
                        full, empty, 128, 128, STAGES)),
    ], [1], [PRODUCER_REGISTERS])  # fmt: skip


def launch_down(
    a: Tensor,
    weights: Tensor,
    out: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    config: WarpSpecializedDown,
    *,
    sorted_token_ids: Tensor,
    pairs: int,
    a_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    experts_elsewhere: bool = False,
) -> None:
    """out [rows, N] = each row of `a` [rows, K] times the weights [N, K] of its block's expert; `weights` [E, N, K].

    Args:
        expert_ids: int32, one per block of 128 rows; tiles of expert -1 are skipped, their rows are not written.
        sorted_token_ids, pairs: as of launch_up. Where a block has at most 64 rows, half the products are left out.
        a_scale: float32 [rows, K / 128], or [rows, 1] per channel; any strides.
        weight_scale: float32 [E, N / 128, K / 128], or [E, N, 1] per channel.
        experts_elsewhere: whether leading blocks may be of expert -1; they are then skipped at once.

    Rows of padding may hold anything and come to hold anything. Allocates nothing and does not wait.

    Raises: MoEExtError where shapes, types or scales do not go together.
    """
    kernel, arguments = down_arguments(
        a, weights, out, expert_ids, num_tokens_post_padded, config, sorted_token_ids=sorted_token_ids, pairs=pairs,
        a_scale=a_scale, weight_scale=weight_scale, experts_elsewhere=experts_elsewhere,
    )  # fmt: skip
    is_pair = kernel is down_pair_kernel
    tiles = expert_ids.numel() * -(-out.shape[1] // (BLOCK if is_pair else 2 * BLOCK))
    launch(kernel, programs(a.device, tiles, 2 if is_pair else 1) if config.persistent else tiles, arguments)


def down_arguments(
    a: Tensor,
    weights: Tensor,
    out: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    config: WarpSpecializedDown,
    *,
    sorted_token_ids: Tensor,
    pairs: int,
    a_scale: Tensor | None,
    weight_scale: Tensor | None,
    experts_elsewhere: bool,
) -> tuple[Any, dict[str, Any]]:
    """The kernel, and every argument and option of it by name. Reads no value of a tensor."""
    scheme = scheme_of(weights, weight_scale)
    _, columns, k = weights.shape
    is_pair = config.form == "pair"
    block_k = BLOCK // a.element_size()
    _check(a, weights, out, scheme, a_scale, is_pair=is_pair)
    asm, ask = strides(a_scale, 2)
    bse, bsn, bsk = strides(weight_scale, 3)
    arguments: dict[str, Any] = {
        "a_desc": box(a, BLOCK, block_k),
        "b_desc": box(weights.view(-1, k), BLOCK if is_pair else 2 * BLOCK, block_k),
        "c_desc": box(out, BLOCK // 2, BLOCK // 2),
        "a_scale_ptr": a_scale,
        "w_scale_ptr": weight_scale,
        "sorted_token_ids": sorted_token_ids,
        "expert_ids": expert_ids,
        "num_tokens_post_padded": num_tokens_post_padded,
        "pairs": pairs,
        "N": columns,
        "K": k,
        "stride_asm": asm,
        "stride_bse": bse,
        "stride_bsn": bsn,
        "group_m": config.group_m,
        "STAGES": config.stages,
        "EXPERTS_ELSEWHERE": experts_elsewhere,
        "PRODUCER_REGISTERS": 24,
        "num_warps": 4,
        **dependent_launch.OPTIONS,
    }
    if scheme == "block":
        arguments |= {"stride_ask": ask, "stride_bsk": bsk}
    if is_pair:
        return down_pair_kernel, arguments | {"maxnreg": 128}
    arguments |= {"REGISTERS": 240}
    if scheme == "block":
        return down_block_kernel, arguments
    return down_kernel, arguments | {"BLOCK_K": block_k, "IS_CHANNEL_SCALED": scheme == "channel"}


def _check(a: Tensor, weights: Tensor, out: Tensor, scheme: str, a_scale: Tensor | None, *, is_pair: bool) -> None:
    _, columns, k = weights.shape
    if a.shape[1] != k or tuple(out.shape) != (a.shape[0], columns) or not weights.is_contiguous():
        raise MoEExtError(
            f"a {tuple(a.shape)}, weights {tuple(weights.shape)}, out {tuple(out.shape)}: expected [rows, K], "
            "contiguous [E, N, K] and [rows, N]"
        )
    wanted = {"none": None, "block": (a.shape[0], k // BLOCK), "channel": (a.shape[0], 1)}[scheme]
    given = None if a_scale is None else tuple(a_scale.shape)
    if a.dtype != weights.dtype or given != wanted or out.dtype not in (torch.bfloat16, torch.float16):
        raise MoEExtError(
            f"a {a.dtype} with scales {given}, weights {weights.dtype} scaled by {scheme}, out {out.dtype}: expected "
            f"one type of a and weights, scales {wanted}, and 16 bits out"
        )
    if scheme == "block" and k % BLOCK:
        raise MoEExtError(f"K = {k} with block-wise scales: expected whole blocks of {BLOCK}")
    if is_pair and scheme != "block":
        raise MoEExtError(
            f'the form "pair" is for block-wise float8, these weights are scaled by {scheme}: take "wide"'
        )
