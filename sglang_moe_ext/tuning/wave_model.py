"""Predict how long a configuration takes on a GPU: waves of tiles, each limited by arithmetic, the L2, or its pipeline.

A ranking, not a stopwatch: docs/prediction.md has its regret against measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sglang_moe_ext.core import PROJECTIONS, Gpu, MoEShape, Projection, Resources, TileConfig
from sglang_moe_ext.roofline import expected_blocks, gemm_floor, load
from sglang_moe_ext.tuning.space import accumulator_registers, smem_bytes

_REGISTERS = 65536
_WARPS = 48
_BLOCKS = 16
_RESERVED_SMEM = 1024

# Fitted to the trials in tests/data/trials (H200, SGLang 0.5.15, Triton 3.6.0).
_LAUNCH_US = 4.0
_TILE_START_US = 1.2
_LOAD_LATENCY_US = 0.9
_L2_GBS_PER_MULTIPROCESSOR = 52.0
_MMA_SYNC_SHARE = 0.6
"""Share of the wgmma rate that Hopper reaches through mma.sync, which tiles of fewer than 64 rows use."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted microseconds of one GEMM, and how many of its blocks share a multiprocessor."""

    us: float
    blocks_per_multiprocessor: int


def estimated(config: TileConfig, shape: MoEShape, gpu: Gpu) -> Resources:
    """What the binary will probably need, before it is compiled."""
    registers = min(255, int(accumulator_registers(config) * (2 if shape.quantisation.is_block_wise else 1)) + 64)
    return Resources(smem_bytes=smem_bytes(config, shape, gpu.sm), registers=registers, spill_bytes=0)


def resident_blocks(config: TileConfig, resources: Resources, gpu: Gpu) -> int:
    """How many blocks of the kernel one multiprocessor holds at once."""
    registers = -(-resources.registers // 8) * 8 * 32 * config.num_warps
    return max(
        1,
        min(
            gpu.smem_per_multiprocessor // (resources.smem_bytes + _RESERVED_SMEM),
            _REGISTERS // registers,
            _WARPS // config.num_warps,
            _BLOCKS,
        ),
    )


def gemm(
    config: TileConfig, shape: MoEShape, gpu: Gpu, tokens: int, projection: Projection, resources: Resources
) -> Prediction:
    """Predict one GEMM of the layer under uniform routing."""
    columns, reduction = shape.gemm(projection)
    expected = load(shape, tokens)
    blocks_m = (shape.experts - shape.fused_shared) * expected_blocks(expected.routed, config.block_m)
    blocks_m += shape.fused_shared * math.ceil(tokens / config.block_m)
    tiles = blocks_m * math.ceil(columns / config.block_n)
    resident = resident_blocks(config, resources, gpu)
    slots = gpu.multiprocessors * resident

    quantisation = shape.quantisation
    steps = math.ceil(reduction / config.block_k)
    step_bytes = config.block_k * (
        config.block_m * quantisation.activation_bits / 8 + config.block_n * quantisation.weight_bits / 8
    )
    busy = min(resident, max(1.0, tiles / gpu.multiprocessors))
    rate = gpu.tflops(quantisation.activation_bits) / gpu.multiprocessors
    if gpu.sm >= 90 and gpu.sm < 120 and config.block_m < 64:
        rate *= _MMA_SYNC_SHARE
    compute_us = 2.0 * config.block_m * config.block_n * config.block_k / rate * 1e-6 * busy
    traffic_us = step_bytes / _L2_GBS_PER_MULTIPROCESSOR * 1e-3 * busy
    latency_us = _LOAD_LATENCY_US / max(1, config.num_stages - 1)
    memory_us = step_bytes * min(slots, max(tiles, 1.0)) / gpu.bandwidth_gbs * 1e-3
    # A wave that reads weights nobody has read yet runs at the memory's speed.
    fresh = min(1.0, expected.active_experts / max(blocks_m, 1e-9))
    step_us = max(compute_us, traffic_us, latency_us, memory_us * fresh)
    tile_us = _TILE_START_US + steps * step_us
    waves = tiles / slots
    waves = math.ceil(waves) if waves < 4 else waves + 0.5
    us = _LAUNCH_US + max(waves * tile_us, gemm_floor(shape, gpu, tokens, projection).us)
    return Prediction(us=us, blocks_per_multiprocessor=resident)


def pair_us(config: TileConfig, shape: MoEShape, gpu: Gpu, tokens: int, resources: dict[Projection, Resources]) -> float:
    """Predicted microseconds of the up and the down GEMM under one configuration."""
    return sum(gemm(config, shape, gpu, tokens, projection, resources[projection]).us for projection in PROJECTIONS)
