"""Predict how long a configuration takes on a GPU: four clocks run at once, and the slowest ones set the time.

The clocks are the matrix units, the traffic from the L2, the chain of steps that each block waits through, and the
memory. A ranking, not a stopwatch: docs/benchmarks/prediction.md has its regret against measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sglang_moe_ext.core import PROJECTIONS, Gpu, MoEShape, Projection, Resources, TileConfig
from sglang_moe_ext.gpu.roofline import Load, expected_blocks, load
from sglang_moe_ext.gpu.shared_memory import smem_bytes
from sglang_moe_ext.tuning.search import gpu_family
from sglang_moe_ext.tuning.search.gpu_family import family_of
from sglang_moe_ext.tuning.search.space import accumulator_registers

_MMA_ROWS = 64  # of one wgmma or tcgen05 instruction; a smaller BLOCK_SIZE_M uses mma.sync
_WARPGROUP_SMS = (90, 100, 103)  # architectures that have those instructions

# Fitted to the compiled grid, tests/data/compiled.
_BASE_REGISTERS = 36  # a thread, beside the accumulator
_MOST_REGISTERS = {False: 255, True: 512}  # of a thread, by whether it runs on an AMD GPU
_POINTER_REGISTERS = 2  # for each 16 bytes that a thread loads a step

# Chosen, not fitted: the regret hardly moves with them.
_L2_SHARE = 0.5  # of the L2 that keeps what is read again: each half holds copies of the other's lines
_OVERLAP = 6.0  # power of the norm that adds clocks inside a multiprocessor: infinity is perfect overlap, 1 is none
_MEMORY_OVERLAP = 2.0  # the same for the memory beside the multiprocessors


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted microseconds of one GEMM, and how many of its blocks share a multiprocessor."""

    us: float
    blocks_per_multiprocessor: int


@dataclass(frozen=True, slots=True)
class _Step:
    """One step of one tile along K, in microseconds: on the matrix units, from the L2, and until its block's next."""

    multiply_us: float
    load_us: float
    chain_us: float


@dataclass(frozen=True, slots=True)
class _Grid:
    """The tiles of a GEMM: blocks of rows over all experts, tiles across the columns, tiles that run at once."""

    blocks_m: float
    columns: int
    slots: int


def estimate(config: TileConfig, shape: MoEShape, gpu: Gpu) -> Resources:
    """What the binary will probably need, before it is compiled."""
    quantization = shape.quantization
    loaded_bits = config.block_m * quantization.activation_bits + config.block_n * quantization.weight_bits
    pointers = config.block_k * loaded_bits / 8 / 16 / (gpu.target.lanes * config.num_warps)
    accumulators = accumulator_registers(config, gpu.target) * (2 if quantization.is_block_wise else 1)
    registers = min(
        _MOST_REGISTERS[gpu.target.is_amd], int(accumulators + _POINTER_REGISTERS * pointers + _BASE_REGISTERS)
    )
    return Resources(smem_bytes=smem_bytes(config, shape, gpu.target), registers=registers, spill_bytes=0)


def _norm(power: float, *parts: float) -> float:
    """Time of parts that overlap, but not perfectly: at least the longest, at most their sum."""
    longest = max(parts)
    return float(longest * sum((part / longest) ** power for part in parts) ** (1 / power))


def _waves(tiles: float, slots: int) -> float:
    """Rounds in which the slots work the tiles off; the last one is on average half empty."""
    rounds = tiles / slots
    return max(1.0, rounds + 0.5 * min(1.0, rounds - 1))


def _multiply_us(config: TileConfig, shape: MoEShape, gpu: Gpu, *, whole: bool) -> float:
    """One step on a multiprocessor's matrix units, which eat no faster than shared memory feeds them.

    `whole`: an instruction of four warps reads both operands there (wgmma, tcgen05); else each warp its part's own.
    """
    rows, columns, bits = config.block_m, config.block_n, shape.quantization.activation_bits
    rate = gpu.tflops(bits) / gpu.multiprocessors
    if whole:
        groups = max(1, config.num_warps // 4) if rows == _MMA_ROWS else 1
        width = rows if rows < _MMA_ROWS else columns / groups
        read = rows * columns * (1 / width + 1 / _MMA_ROWS)
    else:
        rate *= family_of(gpu).mma_sync_share if gpu.sm in _WARPGROUP_SMS else 1.0
        down = min(config.num_warps, max(1.0, rows / 32))
        read = config.num_warps / down * rows + down * columns
    flop_us = 2.0 * rows * columns * config.block_k / rate * 1e-6
    return _norm(_OVERLAP, flop_us, read * config.block_k * bits / 8 / family_of(gpu).lanes_per_ns * 1e-3)


def _short_row_factor(config: TileConfig, shape: MoEShape, gpu: Gpu) -> float:
    """By how much more moves than a step asks for, where it wants less than a line of each row."""
    asked = config.block_k * shape.quantization.weight_bits / 8
    return 1 + family_of(gpu).short_row_share * max(0.0, 128 / asked - 1)


def _step(config: TileConfig, shape: MoEShape, gpu: Gpu, filled: float) -> _Step:
    quantization, family = shape.quantization, family_of(gpu)
    # With swapped operands the weights are the instruction's 64 rows, and the tokens its columns.
    swapped = quantization.row.swaps_operands and gpu.sm == 90 and config.block_m < _MMA_ROWS <= config.block_n
    whole = swapped or (gpu.sm in _WARPGROUP_SMS and config.block_m >= _MMA_ROWS)
    rows_bytes = config.block_m * filled * quantization.activation_bits / 8
    asked = config.block_k * (rows_bytes + config.block_n * quantization.weight_bits / 8)
    load_us = asked * _short_row_factor(config, shape, gpu) / family.l2_gbs * 1e-3
    multiply_us = _multiply_us(config, shape, gpu, whole=whole)
    alone_us = multiply_us * max(1.0, family.busy_warps / config.num_warps)  # of a block that is alone
    if quantization.is_block_wise:  # each partial product is waited for, scaled and added in registers
        work_us = alone_us + config.block_m * config.block_n / family.lanes_per_ns * 1e-3 + family.scale_us
        work_us += family.step_us
    else:
        work_us = max(alone_us, family.step_us) if whole else alone_us + family.step_us
    # Without wgmma a stage is free again only after its step, so the load that refills it waits for that.
    wait_us = family.load_latency_us + load_us + (0.0 if whole or family.loads_beside_work else work_us)
    return _Step(multiply_us, load_us, _norm(_OVERLAP, work_us, wait_us / max(1, config.num_stages - 1)))


def _memory_bytes(
    config: TileConfig, shape: MoEShape, gpu: Gpu, tokens: int, projection: Projection, expected: Load, grid: _Grid
) -> float:
    """Bytes to and from memory. What GROUP_SIZE_M rows of tiles read again comes from the L2 as far as it fits."""

    def missed(working_set: float) -> float:
        return max(0.0, 1 - _L2_SHARE * gpu.l2_mib * 2**20 / max(working_set, 1.0))

    columns, reduction = shape.gemm(projection)
    row_bytes = reduction * shape.quantization.activation_bits / 8
    column_bytes = reduction * shape.quantization.weight_bits / 8
    an_expert = max(1.0, grid.blocks_m / max(expected.active_experts, 1e-9))
    group = min(config.group_m, max(1.0, grid.blocks_m))
    group_bytes = group * config.block_m * row_bytes
    sweep_bytes = max(1.0, grid.slots / group) * config.block_n * column_bytes * max(1.0, group / an_expert)
    weight_passes = max(1.0, an_expert / max(group, grid.slots / grid.columns))
    row_passes = max(1.0, group * grid.columns / grid.slots)
    again = max(0.0, expected.rows - tokens) if projection == "up" else 0.0  # rows that another expert reads too
    rows = expected.rows - again * (1 - missed(tokens * row_bytes))
    weights = expected.active_experts * columns * column_bytes * _short_row_factor(config, shape, gpu)
    weights *= 1 + (weight_passes - 1) * missed(columns * column_bytes + group_bytes)
    activations = rows * row_bytes * (1 + (row_passes - 1) * missed(group_bytes + sweep_bytes))
    return weights + activations + expected.rows * columns * 2


def gemm(
    config: TileConfig, shape: MoEShape, gpu: Gpu, tokens: int, projection: Projection, resources: Resources
) -> Prediction:
    """Predict one GEMM of the layer under uniform routing."""
    columns, reduction = shape.gemm(projection)
    family, expected = family_of(gpu), load(shape, tokens)
    blocks_m = (shape.experts - shape.fused_shared) * expected_blocks(expected.routed, config.block_m)
    blocks_m += shape.fused_shared * math.ceil(tokens / config.block_m)
    resident = gpu_family.resident_blocks(config.num_warps, resources, gpu)
    # What pads the last block of an expert is multiplied, but neither loaded nor stored.
    filled = min(1.0, expected.rows / max(blocks_m * config.block_m, 1e-9))
    grid = _Grid(blocks_m, math.ceil(columns / config.block_n), gpu.multiprocessors * resident)

    step = _step(config, shape, gpu, filled)
    steps = math.ceil(reduction / config.block_k)
    store_us = config.block_m * filled * config.block_n * 2 / family.store_gbs * 1e-3
    tile_us = family.block_start_us + family.warp_start_us * config.num_warps + family.load_latency_us + step.load_us
    tile_us += steps * step.chain_us + store_us
    tiles = grid.blocks_m * grid.columns
    a_multiprocessor = _waves(tiles, gpu.multiprocessors)
    multiply_us = a_multiprocessor * steps * step.multiply_us
    traffic_us = a_multiprocessor * (steps * step.load_us + store_us)
    inside_us = _norm(_OVERLAP, multiply_us, traffic_us, _waves(tiles, grid.slots) * tile_us)
    memory_us = _memory_bytes(config, shape, gpu, tokens, projection, expected, grid) / gpu.bandwidth_gbs * 1e-3
    return Prediction(family.launch_us + _norm(_MEMORY_OVERLAP, inside_us, memory_us), resident)


def pair_us(
    config: TileConfig, shape: MoEShape, gpu: Gpu, tokens: int, resources: dict[Projection, Resources]
) -> float:
    """Predicted microseconds of the up and the down GEMM under one configuration."""
    return sum(gemm(config, shape, gpu, tokens, projection, resources[projection]).us for projection in PROJECTIONS)
