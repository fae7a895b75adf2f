"""The candidates, and the rules that drop what cannot run or win: the single statement of each constraint."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sglang_moe_ext.core import PROJECTIONS, Gpu, MoEShape, Target, TileConfig
from sglang_moe_ext.gpu.shared_memory import smem_bytes


@dataclass(frozen=True, slots=True)
class Rule:
    """One constraint: `keeps` is False for the candidates that it drops, `why` is what the plan prints of them."""

    name: str
    why: str
    keeps: Callable[[TileConfig, MoEShape, Gpu], bool]


@dataclass(frozen=True, slots=True)
class PrunedSpace:
    """The candidates that every rule keeps, and how many each rule dropped first."""

    kept: tuple[TileConfig, ...]
    dropped: dict[str, int]


def full_space() -> tuple[TileConfig, ...]:
    """On NVIDIA GPUs: the 1,920 configurations that upstream's own tuner tries on CUDA."""
    return tuple(
        TileConfig(block_m, block_n, block_k, group_m, num_warps, num_stages)
        for block_m, block_n, block_k, group_m, num_warps, num_stages in itertools.product(
            (16, 32, 64, 128, 256), (32, 64, 128, 256), (64, 128, 256), (1, 16, 32, 64), (4, 8), (2, 3, 4, 5)
        )
    )


def accumulator_registers(config: TileConfig, target: Target) -> float:
    """Registers a thread for the float32 accumulator tile."""
    return config.block_m * config.block_n / (target.lanes * config.num_warps)


def _fits(config: TileConfig, shape: MoEShape, gpu: Gpu) -> bool:
    return smem_bytes(config, shape, gpu.target) <= gpu.smem_per_block


def _accumulates_in_registers(config: TileConfig, shape: MoEShape, gpu: Gpu) -> bool:
    if gpu.sm in (100, 103):
        return True  # the accumulator lies in tensor memory
    limit = 64 if shape.quantization.is_block_wise else 128
    return accumulator_registers(config, gpu.target) <= limit


def _meets_scales(config: TileConfig, shape: MoEShape, gpu: Gpu) -> bool:
    block = shape.quantization.block_shape
    return block is None or not all(block) or block[1] % config.block_k == 0


def _is_within_work(config: TileConfig, shape: MoEShape, gpu: Gpu) -> bool:
    columns = min(shape.gemm(projection)[0] for projection in PROJECTIONS)
    reduction = min(shape.gemm(projection)[1] for projection in PROJECTIONS)
    return config.block_n < 2 * columns and config.block_k < 2 * reduction


QUANTIZATION_BLOCK = Rule("quantization block", "BLOCK_SIZE_K must lie within one scale's block", _meets_scales)
WITHIN_WORK = Rule(
    "tile larger than the work", "half of BLOCK_SIZE_N or BLOCK_SIZE_K would be padding", _is_within_work
)
SHARED_MEMORY = Rule("shared memory", "its pipeline stages do not fit into one block's shared memory", _fits)
RULES = (
    QUANTIZATION_BLOCK,
    WITHIN_WORK,
    SHARED_MEMORY,
    Rule("accumulator", "its accumulator alone would spill registers", _accumulates_in_registers),
)
"""On NVIDIA GPUs; `rocm_space` has those of AMD's."""


def prune(candidates: Iterable[TileConfig], shape: MoEShape, gpu: Gpu, rules: Sequence[Rule] = RULES) -> PrunedSpace:
    """Drop what the rules drop; each candidate counts for the first rule that drops it."""
    kept: list[TileConfig] = []
    dropped = {rule.name: 0 for rule in rules}
    for candidate in candidates:
        breaks = next((rule for rule in rules if not rule.keeps(candidate, shape, gpu)), None)
        if breaks is None:
            kept.append(candidate)
        else:
            dropped[breaks.name] += 1
    return PrunedSpace(tuple(kept), dropped)
