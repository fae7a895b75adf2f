"""Shared memory that a configuration of the engine's kernel needs: the only place that states it."""

from __future__ import annotations

from sglang_moe_ext.core import MoEShape, Target, TileConfig

_WGMMA_ROWS = 64
"""Rows of one wgmma or tcgen05 tile: from this BLOCK_SIZE_M on, operands stay in shared memory a stage longer."""


def operand_bytes(shape: MoEShape) -> float:
    """Bytes of one element in shared memory; of the wider operand where the two differ."""
    return shape.quantization.activation_bits / 8


def smem_bytes(config: TileConfig, shape: MoEShape, target: Target) -> int:
    """Shared memory of the engine's kernel, in bytes per block; a lower bound where only the weights are quantized.

    Checked against the compiler on the grid in tests/data/compiled.
    """
    quantization, sm = shape.quantization, target.sm
    swapped = quantization.row.swaps_operands and sm == 90 and config.block_m < _WGMMA_ROWS <= config.block_n
    wgmma = sm in (90, 100, 103) and (config.block_m >= _WGMMA_ROWS or swapped)
    weight_bytes = quantization.weight_bits / 8
    stage = config.block_k * (config.block_m * operand_bytes(shape) + config.block_n * weight_bytes)
    # One stage is not pipelined, but its operands still take their place once.
    return int(stage * (config.num_stages if wgmma else max(config.num_stages - 1, 1)))
