"""Device code shared by the warp-specialized kernels (Gluon, sm_90): tile order, the TMA producer, epilogue pieces.

A kernel has three warpgroups. A producer fills a ring of stages; two consumers, one warpgroup each, multiply 64 rows of
a 128-row tile. Partitions meet only on mbarriers: `full[s]` (stage s has landed) and `empty[s]` (both consumers have
read stage s). Every partition numbers the steps of all its tiles with one counter n: slot n % STAGES, and parity
n // STAGES & 1. No loop carries two names of one value: Triton 3.6.0 merges them, and the kernel hangs.

Constraints that shape the code: one warpgroup per partition (triton issue 11047: warpgroup_mma_wait does not hold
several warpgroups together); A in shared memory (triton issues 9433 and 11781: registers of A may be overwritten).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

# Renamed upstream: barrier in 3.7, async_load and async_store in 3.8; the old names raise in 3.9.
sync_warps = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
gather_rows = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

HALF_M = gl.constexpr(64)
"""Rows of one consumer: the M of a wgmma instruction."""
WHOLE_M = gl.constexpr(128)
"""Rows of a tile, and of a block of the sort."""
BOX_N = gl.constexpr(64)
"""Columns of one TMA store: 128 bytes of 16-bit results, one swizzle atom."""


@gluon.jit
def join_chain():  # type: ignore[no-untyped-def]
    """As `dependent_launch.let_next_start`, then `wait_for_last`: the last call before the first load."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def tile_at(tile, tiles_m, tiles_n, group_m):  # type: ignore[no-untyped-def]
    """(m, n) of a tile: group_m rows of tiles go down a column before the next one, whose weights stay in L2."""
    per_group = group_m * tiles_n
    first_m = tile // per_group * group_m
    height = max(min(tiles_m - first_m, group_m), 1)
    within = tile % per_group
    return first_m + within % height, within // height


@gluon.jit
def first_block_here(expert_ids, blocks):  # type: ignore[no-untyped-def]
    """The first block whose expert is not -1. SGLang sorts the pairs of other ranks' experts to the front."""
    CHUNK: gl.constexpr = 1024
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    first = blocks
    for start in range(0, blocks, CHUNK):
        block = start + gl.arange(0, CHUNK, layout)
        expert = gl.load(expert_ids + block, mask=block < blocks, other=-1)
        first = min(first, gl.min(gl.where(expert >= 0, block, blocks), 0))
    return first


@gluon.jit
def expert_at(expert_ids, tile_m, tiles):  # type: ignore[no-untyped-def]
    """The expert of a row of tiles; -1 where there is no tile at all, and nothing may be read."""
    return gl.load(expert_ids + tile_m, mask=tiles > 0, other=-1)


@gluon.jit
def is_tail(sorted_token_ids, tile_m, tiles, pairs):  # type: ignore[no-untyped-def]
    """Whether the second half of the tile is padding only: an expert's padding is at the end of its last block."""
    return gl.load(sorted_token_ids + tile_m * WHOLE_M + HALF_M, mask=tiles > 0, other=0) >= pairs


@gluon.jit
def tile_after(tile, tiles, tiles_m, tiles_n, group_m):  # type: ignore[no-untyped-def]
    """(m, n) of this program's tile after `tile`, or of the last tile where that was its last one."""
    return tile_at(max(min(tile + gl.num_programs(0), tiles - 1), 0), tiles_m, tiles_n, group_m)


@gluon.jit
def first_tile(tiles, tiles_m, tiles_n, group_m):  # type: ignore[no-untyped-def]
    """(m, n) of this program's first tile, or of the last tile where it has none."""
    return tile_at(max(min(gl.program_id(0), tiles - 1), 0), tiles_m, tiles_n, group_m)


@gluon.jit
def pinned(x):  # type: ignore[no-untyped-def]
    """x, through a volatile move: computed before what follows.

    With it and one partial product that goes round the loop (`use_acc` false at run time, unknown to the compiler),
    ptxas keeps one partial. Without, it keeps two in 64 registers each and spills 216 bytes (Triton 3.6.0).
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-x)) to about 2 ulp, in 5 instructions. Triton's division and exponential take about 20.

    An epilogue has 8192 of them in a warpgroup, while the tensor core may wait.
    """
    return gl.inline_asm_elementwise(
        """
        {
        .reg .f32 t;
        mul.ftz.f32 t, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 t, t;
        add.ftz.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t;
        }
        """,
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def silu_mul(gate, up):  # type: ignore[no-untyped-def]
    """silu(gate) * up in float32."""
    return gate * up * sigmoid(gate)


@gluon.jit
def store_piece(c_desc, buffer, row, column, values):  # type: ignore[no-untyped-def]
    """Store one box through `buffer`, of which a consumer has two in turn: the store before last has left it."""
    tma.store_wait(1)
    sync_warps()  # one thread issued that store and waited for it
    buffer.store(values.to(c_desc.dtype))
    hopper.fence_async_shared()
    sync_warps()
    store_box(c_desc, [row, column], buffer)


@gluon.jit  # type: ignore[untyped-decorator]
def halves(x, COLUMNS: gl.constexpr):  # type: ignore[no-untyped-def]
    """The left and right COLUMNS of x [64, 2 * COLUMNS]. Both lie in the same threads: nothing moves."""
    return gl.split(gl.permute(gl.reshape(x, (HALF_M, 2, COLUMNS)), (0, 2, 1)))


@gluon.jit  # type: ignore[untyped-decorator]
def store_columns(c_desc, buffers, WHICH: gl.constexpr, row, column, values):  # type: ignore[no-untyped-def]
    """Store [64, 128] in two boxes of 64 columns."""
    left, right = halves(values, BOX_N)
    store_piece(c_desc, buffers.index(2 * WHICH), row, column, left)
    store_piece(c_desc, buffers.index(2 * WHICH + 1), row, column + BOX_N, right)


@gluon.jit  # type: ignore[untyped-decorator]
def drain(first, steps, full, empty, STAGES: gl.constexpr):  # type: ignore[no-untyped-def]
    """Give back the stages of a tile without reading them."""
    for k in range(steps):
        mbarrier.wait(full.index((first + k) % STAGES), (first + k) // STAGES & 1)
        mbarrier.arrive(empty.index((first + k) % STAGES))
