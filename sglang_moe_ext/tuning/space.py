"""The candidates, and the rules that drop what cannot run or win: the single statement of each constraint."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sglang_moe_ext.core import PROJECTIONS, Gpu, MoEShape, TileConfig

_WGMMA_ROWS = 64
"""Rows of one wgmma or tcgen05 tile: from this BLOCK_SIZE_M on, operands stay in shared memory a stage longer."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One constraint: `keeps` is False for the candidates that it drops, `why` is what the plan prints of them."""

    name: str
    why: str
    keeps: Callable[[TileConfig, MoEShape, Gpu], bool]


@dataclass(frozen=True, slots=True)
class Sifted:
    """The candidates that every rule keeps, and how many each rule dropped first."""

    kept: tuple[TileConfig, ...]
    dropped: dict[str, int]


def full_space() -> tuple[TileConfig, ...]:
    """The 1,920 configurations that upstream's own tuner tries on CUDA."""
    return tuple(
        TileConfig(block_m, block_n, block_k, group_m, num_warps, num_stages)
        for block_m, block_n, block_k, group_m, num_warps, num_stages in itertools.product(
            (16, 32, 64, 128, 256), (32, 64, 128, 256), (64, 128, 256), (1, 16, 32, 64), (4, 8), (2, 3, 4, 5)
        )
    )


def operand_bytes(shape: MoEShape) -> float:
    """Bytes of one element as it lies in shared memory; of the wider operand where they differ."""
    return shape.quantisation.activation_bits / 8


def smem_bytes(config: TileConfig, shape: MoEShape, sm: int) -> int:
    """Shared memory that the engine's kernel asks for, bytes a block; a lower bound where weights alone are quantised.

    Held against the compiler on the grid in tests/data/compiled.
    """
    quantisation = shape.quantisation
    swapped = quantisation.scheme == "fp8_w8a8" and sm == 90 and config.block_m < _WGMMA_ROWS <= config.block_n
    wgmma = sm in (90, 100, 103) and (config.block_m >= _WGMMA_ROWS or swapped)
    weight_bytes = quantisation.weight_bits / 8
    stage = config.block_k * (config.block_m * operand_bytes(shape) + config.block_n * weight_bytes)
    return int(stage * (config.num_stages if wgmma else config.num_stages - 1))


def accumulator_registers(config: TileConfig) -> float:
    """Registers a thread for the float32 accumulator tile."""
    return config.block_m * config.block_n / (32 * config.num_warps)


def _fits(config: TileConfig, shape: MoEShape, gpu: Gpu) -> bool:
    return smem_bytes(config, shape, gpu.sm) <= gpu.smem_per_block


def _accumulates_in_registers(config: TileConfig, shape: MoEShape, gpu: Gpu) -> bool:
    if gpu.sm in (100, 103):
        return True  # the accumulator lies in tensor memory
    limit = 64 if shape.quantisation.is_block_wise else 128
    return accumulator_registers(config) <= limit


def _meets_scales(config: TileConfig, shape: MoEShape, gpu: Gpu) -> bool:
    block = shape.quantisation.block_shape
    return block is None or not all(block) or block[1] % config.block_k == 0


def _is_within_work(config: TileConfig, shape: MoEShape, gpu: Gpu) -> bool:
    columns = min(shape.gemm(projection)[0] for projection in PROJECTIONS)
    reduction = min(shape.gemm(projection)[1] for projection in PROJECTIONS)
    return config.block_n < 2 * columns and config.block_k < 2 * reduction


RULES = (
    Rule("quantisation block", "BLOCK_SIZE_K must lie within one scale's block", _meets_scales),
    Rule("tile larger than the work", "half of BLOCK_SIZE_N or BLOCK_SIZE_K would be padding", _is_within_work),
    Rule("shared memory", "its pipeline stages do not fit into one block's shared memory", _fits),
    Rule("accumulator", "its accumulator alone would spill registers", _accumulates_in_registers),
)


def sift(candidates: Iterable[TileConfig], shape: MoEShape, gpu: Gpu, rules: Sequence[Rule] = RULES) -> Sifted:
    """Drop what the rules drop; each candidate counts for the first rule that drops it."""
    kept: list[TileConfig] = []
    dropped = {rule.name: 0 for rule in rules}
    for candidate in candidates:
        breaks = next((rule for rule in rules if not rule.keeps(candidate, shape, gpu)), None)
        if breaks is None:
            kept.append(candidate)
        else:
            dropped[breaks.name] += 1
    return Sifted(tuple(kept), dropped)
