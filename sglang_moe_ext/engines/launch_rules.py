"""The rules that a configuration must meet before an engine's fused-MoE kernel is launched with it, as data.

A configuration that breaks a rule gives wrong numbers or cannot be compiled. tests/engines/test_launch_rules.py runs
the engines' own kernels over a grid of tiles for each quantization scheme, and holds them against these rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from sglang_moe_ext.core import MoEShape, Projection, TileConfig
from sglang_moe_ext.engines.sglang import support

LARGEST_OPERAND = 2**17
"""Elements of one operand's tile. The largest of the engines' 3,553 tables is half of it; at twice this size one stage
of 16-bit operands needs more shared memory than any GPU has."""
LARGEST_ACCUMULATOR = 512
"""Float32 values of the accumulator in one thread. The largest of the engines' tables has 256; a thread has 255
registers. 1024x1024x16 with 32 warps has 1024, and was not compiled for sm_90 within 240 s (Triton 3.7.1)."""
MOST_WARPS = 32
"""A block has at most 1024 threads."""


@dataclass(frozen=True, slots=True)
class KernelLaunch:
    """One GEMM of a layer, launched by that release of an engine with that configuration."""

    engine: Literal["sglang", "vllm"]
    version: tuple[int, int, int]
    config: TileConfig
    shape: MoEShape
    projection: Projection


@dataclass(frozen=True, slots=True)
class LaunchRule:
    """`harm`: what the kernel does with a configuration that breaks the rule.

    `mend` returns the nearest configuration that keeps the rule, with the same BLOCK_SIZE_M. None: there is no such.
    """

    name: str
    harm: str
    keeps: Callable[[KernelLaunch], bool]
    mend: Callable[[KernelLaunch], TileConfig] | None = None


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def _has_sides_that_compile(launch: KernelLaunch) -> bool:
    config = launch.config
    return all(map(_is_power_of_two, (config.block_m, config.block_n, config.block_k)))


def _has_warps_that_launch(launch: KernelLaunch) -> bool:
    return _is_power_of_two(launch.config.num_warps) and launch.config.num_warps <= MOST_WARPS


def _is_compiled_in_time(launch: KernelLaunch) -> bool:
    config = launch.config
    operand = max(config.block_m, config.block_n) * config.block_k
    accumulator = config.block_m * config.block_n / (32 * config.num_warps)
    return operand <= LARGEST_OPERAND and accumulator <= LARGEST_ACCUMULATOR


def shortest_k(shape: MoEShape) -> int:
    """The least BLOCK_SIZE_K of a matrix product, by `min_dot_size` of Triton's NVIDIA backend (3.4 to 3.7)."""
    return 32 if shape.quantization.activation_bits == 8 else 16


def _is_long_enough(launch: KernelLaunch) -> bool:
    return launch.config.block_k >= shortest_k(launch.shape)


def _block_shape(launch: KernelLaunch) -> tuple[int, int] | None:
    quantization = launch.shape.quantization
    return quantization.block_shape if quantization.is_block_wise else None


def _is_within_scales_along_k(launch: KernelLaunch) -> bool:
    block = _block_shape(launch)
    return block is None or block[1] % launch.config.block_k == 0


def _shorten_k(launch: KernelLaunch) -> TileConfig:
    block = _block_shape(launch)
    assert block is not None
    return replace(launch.config, block_k=math.gcd(launch.config.block_k, block[1]))


def _is_within_scales_along_n(launch: KernelLaunch) -> bool:
    """SGLang reads one scale for the whole tile unless BLOCK_SIZE_N is larger than a block; vLLM reads one a column."""
    block, block_n = _block_shape(launch), launch.config.block_n
    return launch.engine == "vllm" or block is None or block_n > block[0] or block[0] % block_n == 0


def _narrow_n(launch: KernelLaunch) -> TileConfig:
    block = _block_shape(launch)
    assert block is not None
    return replace(launch.config, block_n=math.gcd(launch.config.block_n, block[0]))


def _has_tma_that_is_right(launch: KernelLaunch) -> bool:
    if not launch.config.use_tma:
        return True
    quantization = launch.shape.quantization
    return launch.engine == "sglang" and support.is_right(launch.projection, quantization, launch.version)


RULES = (
    LaunchRule("BLOCK_SIZE_M, N and K are powers of two", "Triton cannot compile it", _has_sides_that_compile),
    LaunchRule("num_warps is a power of two up to 32", "Triton cannot compile it", _has_warps_that_launch),
    LaunchRule("the tile is no larger than any GPU can hold", "it compiles for minutes", _is_compiled_in_time),
    LaunchRule(
        "USE_TMA only where it is right",
        "the engine would end or compute wrong results",
        _has_tma_that_is_right,
        lambda launch: replace(launch.config, use_tma=False),
    ),
    LaunchRule(
        "BLOCK_SIZE_K divides a block of scales",
        "the kernel reads one scale a step, so its results would be wrong",
        _is_within_scales_along_k,
        _shorten_k,
    ),
    LaunchRule(
        "BLOCK_SIZE_N divides a block of scales, or is larger",
        "the kernel reads one scale a tile, so its results would be wrong",
        _is_within_scales_along_n,
        _narrow_n,
    ),
    LaunchRule("BLOCK_SIZE_K is at least 16, or 32 for 8-bit operands", "Triton cannot compile it", _is_long_enough),
)


@dataclass(frozen=True, slots=True)
class RuledConfig:
    """A configuration that keeps every rule, and the rules that the one before it broke."""

    config: TileConfig
    mended: tuple[LaunchRule, ...]


def apply(launch: KernelLaunch) -> RuledConfig | LaunchRule:
    """The configuration as it may be launched, or the rule that nothing can mend."""
    mended: list[LaunchRule] = []
    for rule in RULES:
        if rule.keeps(launch):
            continue
        if rule.mend is None:
            return rule
        launch = replace(launch, config=rule.mend(launch))
        mended.append(rule)
    return RuledConfig(launch.config, tuple(mended))


def plain_tile(block_m: int, shape: MoEShape) -> TileConfig:
    """A small configuration that keeps every rule for blocks of `block_m` rows, which must be a power of two."""
    quantization = shape.quantization
    block_n, block_k = quantization.block_shape if quantization.is_block_wise and quantization.block_shape else (64, 64)
    return TileConfig(block_m, math.gcd(64, block_n), math.gcd(64, block_k), 1, num_warps=4, num_stages=2)
