"""Which of our own paths are tried at one M: few, since each is compiled where it is measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from sglang_moe_ext.core import MoEShape, TileConfig
from sglang_moe_ext.sorted_path import LONGEST_K, Down, DownConfig, ShortDownConfig, Up, UpConfig

_GROUP = 128
"""Columns that share a scale of block-wise float8."""
BLOCKS_M = (64, 128)
_FEWEST_ROWS = 32


@dataclass(frozen=True, slots=True)
class Rule:
    """One constraint of the layer and its batch; `why` is what a report says where it does not hold."""

    why: str
    keeps: Callable[[MoEShape, int], bool]


def _is_multiplied(shape: MoEShape, _: int) -> bool:
    quantisation = shape.quantisation
    is_scaled = quantisation.per_channel or quantisation.block_shape == (_GROUP, _GROUP)
    return quantisation.scheme is None or (quantisation.scheme == "fp8_w8a8" and is_scaled)


RULES = (
    Rule("our kernels multiply 16 bits, and float8 in blocks of 128 or per channel", _is_multiplied),
    Rule("with expert parallelism nobody measured our path", lambda shape, _: shape.ep == 1),
    Rule("our activation is SwiGLU", lambda shape, _: shape.gated),
    Rule(
        f"our tiles take whole groups of {_GROUP} columns",
        lambda shape, _: not (shape.intermediate_size % _GROUP or shape.hidden_size % _GROUP),
    ),
    # H200, 2026-11-21: below, ours lost at every M of four layers (docs/down_projection.md).
    Rule(
        f"with fewer than {_FEWEST_ROWS} rows an expert, tiles of {BLOCKS_M[0]} rows are padding",
        lambda shape, tokens: tokens * shape.top_k >= _FEWEST_ROWS * shape.experts,
    ),
)


def why_not(shape: MoEShape, tokens: int) -> str | None:
    """Why no path is tried there."""
    return next((rule.why for rule in RULES if not rule.keeps(shape, tokens)), None)


_Kind = Literal["16 bits", "block", "channel"]
_UPS: dict[_Kind, tuple[tuple[int, int, int, int, int, int, bool, bool], ...]] = {
    # block_m, block_n, block_k, warps, stages, programs an SM (0: not persistent), is_fused, half stores
    "16 bits": (
        (128, 128, 64, 8, 4, 1, True, False),
        (128, 128, 64, 8, 3, 1, True, False),
        (128, 256, 64, 8, 4, 1, False, True),
        (64, 128, 64, 8, 4, 1, True, False),
        (64, 128, 64, 4, 4, 1, True, False),
        (64, 128, 64, 4, 2, 2, True, False),
    ),
    "block": (
        (64, 128, 128, 8, 3, 1, True, False),
        (64, 128, 128, 8, 2, 0, True, False),
        (64, 128, 128, 4, 3, 0, False, False),
        (64, 128, 128, 4, 4, 2, False, False),
        (128, 128, 128, 8, 3, 1, False, False),
    ),
    "channel": (),  # our up kernel knows no scales of channels
}
_UP_GROUPS = (8, 32)

_DOWNS: dict[_Kind, tuple[tuple[int, int, int, int, int, int, bool], ...]] = {
    # block_m, block_n, block_k, warps, stages, programs an SM (0: not persistent), half stores; the best guess first
    "16 bits": (
        (128, 256, 64, 8, 4, 1, True),
        (128, 256, 64, 8, 3, 1, False),
        (64, 256, 64, 8, 4, 1, True),
        (64, 256, 64, 4, 3, 1, False),
        (64, 128, 64, 4, 4, 2, False),
    ),
    "block": (
        (64, 128, 128, 4, 4, 2, False),
        (64, 128, 128, 4, 3, 0, False),
        (64, 128, 128, 8, 3, 2, False),
        (128, 128, 128, 8, 3, 2, False),
    ),
    "channel": (
        (128, 256, 128, 8, 4, 1, True),
        (128, 256, 128, 8, 3, 1, False),
        (64, 256, 128, 8, 4, 1, True),
        (64, 256, 128, 4, 3, 1, False),
        (64, 128, 128, 4, 4, 2, False),
    ),
}
_DOWN_GROUPS = (8, 1)
# block_m, block_n, block_k, tiles a program, warps, stages
_SHORT_DOWNS_BLOCK_FP8 = ((64, 64, 128, 28, 4, 3), (64, 64, 128, 112, 4, 3))


def ups(shape: MoEShape, engines: Iterable[TileConfig]) -> list[Up]:
    """The engine's up GEMM as it runs, where its blocks of the sort suit our down GEMM, and ours."""
    plain = dict.fromkeys(replace(config, use_tma=False) for config in engines if config.block_m in BLOCKS_M)
    columns = shape.intermediate_size
    return [
        *plain,
        *(
            UpConfig(m, n, k, group, warps, stages, crew > 0, max(crew, 1), is_fused, half)
            for (m, n, k, warps, stages, crew, is_fused, half), group in itertools.product(
                _UPS[_kind(shape)], _UP_GROUPS
            )
            if (columns if is_fused else 2 * columns) % n == 0 and shape.hidden_size % k == 0
        ),
    ]


def downs(shape: MoEShape, block_m: int) -> list[Down]:
    """Those whose rows lie within one block of the sort, the best guess first."""
    found: list[Down] = [
        DownConfig(m, n, k, group, warps, stages, crew > 0, max(crew, 1), half)
        for (m, n, k, warps, stages, crew, half), group in itertools.product(_DOWNS[_kind(shape)], _DOWN_GROUPS)
        if block_m % m == 0
    ]
    found.sort(key=lambda config: -config.block_m)  # stable: whole blocks first
    if shape.quantisation.is_block_wise and shape.intermediate_size <= LONGEST_K:
        found += [ShortDownConfig(*numbers) for numbers in _SHORT_DOWNS_BLOCK_FP8 if block_m % numbers[0] == 0]
    return found


def _kind(shape: MoEShape) -> _Kind:
    if shape.quantisation.scheme is None:
        return "16 bits"
    return "block" if shape.quantisation.is_block_wise else "channel"
