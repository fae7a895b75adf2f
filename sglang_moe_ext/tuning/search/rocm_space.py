"""What vLLM's own tuner tries on AMD GPUs, and the rules that drop what cannot run or win there.

Rules of vLLM 0.33.0's `benchmark_moe.py`, each once; of its two that no candidate breaks, none. Nothing here measures:
our clocks, our compiler and our GPUs know CUDA alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from sglang_moe_ext.core import MoEShape, Projection

Family = Literal["CDNA", "RDNA"]
"""Data centre GPUs with MFMA instructions, and those with WMMA ones."""

_BLOCKS = (16, 32, 64, 128, 256)
_WMMA = 16
_LDS_BYTES = 65_536
_LARGE = 2048
_VGPRS = 256


@dataclass(frozen=True, slots=True)
class RocmTile:
    """As `TileConfig`, always of two stages; `matrix_instr` and `kpack` where the family and the dtype have them."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    waves_per_eu: int
    matrix_instr: int | None = None
    kpack: int | None = None


@dataclass(frozen=True, slots=True)
class Gemm:
    """One GEMM on one family: rows of pairs of token and expert, columns, reduction, bytes of an operand's element."""

    rows: int
    columns: int
    reduction: int
    element_bytes: int
    family: Family

    @property
    def is_large(self) -> bool:
        return self.rows >= _LARGE and self.columns >= _LARGE

    def instruction(self, tile: RocmTile) -> int:
        """Rows and columns of one matrix instruction."""
        return _WMMA if tile.matrix_instr is None else tile.matrix_instr


@dataclass(frozen=True, slots=True)
class RocmRule:
    """As `space.Rule`, of one GEMM: a candidate stays where some GEMM of the layer keeps it."""

    name: str
    why: str
    keeps: Callable[[RocmTile, Gemm], bool]


def full_space(shape: MoEShape, family: Family) -> tuple[RocmTile, ...]:
    """40,000 candidates of 16-bit weights on CDNA, 10,000 on RDNA; 8,000 of narrower ones."""
    is_wide = shape.quantization.scheme is None
    blocks_k = _BLOCKS if is_wide else _BLOCKS[1:]
    has_choice = is_wide and family == "CDNA"
    instructions: tuple[tuple[int | None, int | None], ...] = tuple(itertools.product((16, 32), (1, 2)))
    return tuple(
        RocmTile(m, n, k, group, warps, waves, *instruction)
        for m, n, k, warps, group, waves, instruction in itertools.product(
            _BLOCKS,
            _BLOCKS,
            blocks_k,
            (1, 2, 4, 8),
            (1, 4, 8, 16, 32),
            (0, 1, 2, 4),
            instructions if has_choice else ((None, None),),
        )
    )


def gemm(shape: MoEShape, projection: Projection, tokens: int, family: Family) -> Gemm:
    """That GEMM of the layer; upstream counts an element of anything quantized as one byte."""
    columns, reduction = shape.gemm(projection)
    element_bytes = 2 if shape.quantization.scheme is None else 1
    return Gemm(tokens * shape.top_k, columns, reduction, element_bytes, family)


def _fits_instruction(tile: RocmTile, gemm: Gemm) -> bool:
    """Rules of 16-bit operands: an instruction within the tile and the work, or else the tile is one instruction."""
    if gemm.element_bytes != 2:
        return True
    size = gemm.instruction(tile)
    largest = 16 if min(gemm.rows, gemm.columns) < 32 else 32
    if size > min(largest, tile.block_m, tile.block_n):
        return False
    return (size < gemm.rows or size == tile.block_m) and (size < gemm.columns or size == tile.block_n)


def _is_within_work(tile: RocmTile, gemm: Gemm) -> bool:
    return tile.block_m == _BLOCKS[0] or tile.block_m <= 2 * gemm.rows


def _is_within_columns(tile: RocmTile, gemm: Gemm) -> bool:
    return tile.block_n == _BLOCKS[0] or tile.block_n <= 2 * gemm.columns


def _divides_reduction(tile: RocmTile, gemm: Gemm) -> bool:
    return gemm.reduction % tile.block_k == 0


def _has_rows_for_group(tile: RocmTile, gemm: Gemm) -> bool:
    return tile.group_m == 1 or tile.group_m * tile.block_m <= gemm.rows


def _fits_lds(tile: RocmTile, gemm: Gemm) -> bool:
    return tile.block_k * (tile.block_m + tile.block_n) * gemm.element_bytes <= _LDS_BYTES


def _is_large_enough(tile: RocmTile, gemm: Gemm) -> bool:
    return not gemm.is_large or (min(tile.block_m, tile.block_n, tile.block_k) >= 64 and tile.num_warps >= 4)


def _accumulates_in_registers(tile: RocmTile, gemm: Gemm) -> bool:
    instructions = (tile.block_m // _WMMA) * (tile.block_n // _WMMA) // tile.num_warps
    return gemm.family == "CDNA" or instructions * 8 < _VGPRS


RULES = (
    RocmRule("matrix instruction", "larger than the tile or the work", _fits_instruction),
    RocmRule("rows", "more than half of BLOCK_SIZE_M would be padding", _is_within_work),
    RocmRule("columns", "more than half of BLOCK_SIZE_N would be padding", _is_within_columns),
    RocmRule("reduction", "BLOCK_SIZE_K must divide it", _divides_reduction),
    RocmRule("group", "GROUP_SIZE_M tiles have more rows than there are", _has_rows_for_group),
    RocmRule("LDS", "the operands of one stage do not fit into 64 KiB", _fits_lds),
    RocmRule("large GEMM", "small tiles and few warps never win there", _is_large_enough),
    RocmRule("accumulator", "a wave of RDNA has 256 vector registers", _accumulates_in_registers),
)


def kept(candidates: Iterable[RocmTile], shape: MoEShape, tokens: int, family: Family) -> tuple[RocmTile, ...]:
    """The candidates that all rules keep in the up GEMM, or in the down GEMM."""
    gemms = (gemm(shape, "up", tokens, family), gemm(shape, "down", tokens, family))
    return tuple(tile for tile in candidates if any(all(rule.keeps(tile, of) for rule in RULES) for of in gemms))
