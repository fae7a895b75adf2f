"""The shared memory that the engine's kernel asks for: the single statement of what a configuration needs."""

from __future__ import annotations

from sglang_moe_ext.core import MoEShape, TileConfig

_WGMMA_ROWS = 64
"""Rows of one wgmma or tcgen05 tile: from this BLOCK_SIZE_M on, operands stay in shared memory a stage longer."""


def operand_bytes(shape: MoEShape) -> float:
    """Bytes of one element as it lies in shared memory; of the wider operand where they differ."""
    return shape.quantization.activation_bits / 8


def smem_bytes(config: TileConfig, shape: MoEShape, sm: int) -> int:
    """Shared memory that the engine's kernel asks for, bytes a block; a lower bound where weights alone are quantized.

    Held against the compiler on the grid in tests/data/compiled.
    """
    quantization = shape.quantization
    swapped = quantization.row.swaps_operands and sm == 90 and config.block_m < _WGMMA_ROWS <= config.block_n
    wgmma = sm in (90, 100, 103) and (config.block_m >= _WGMMA_ROWS or swapped)
    weight_bytes = quantization.weight_bits / 8
    stage = config.block_k * (config.block_m * operand_bytes(shape) + config.block_n * weight_bytes)
    # One stage is not pipelined, and its operands still lie there once.
    return int(stage * (config.num_stages if wgmma else max(config.num_stages - 1, 1)))
