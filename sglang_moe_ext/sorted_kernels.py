"""Kernel plans: which of our kernels (`kernels/sorted_*.py`) run a fused-MoE layer, and with which tiles."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_moe_ext.core import TileConfig

FIRST_SM = 90
"""With TMA, and the matrix units that the kernels are written for."""


@dataclass(frozen=True, slots=True)
class UpConfig:
    """Tiles and crew of `sorted_up`. Where `persistent`, that many programs an SM take tiles until none is left.

    Where `is_fused`, `block_n` are columns of the activations, which take twice as many of the weights; else of gate
    and up as they lie, which `half_stores` stores by halves of a tile.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    persistent: bool = True
    programs_per_sm: int = 1
    is_fused: bool = True
    half_stores: bool = False

    def __str__(self) -> str:
        return f"{_tile(self)}{' fused' if self.is_fused else ''}"


@dataclass(frozen=True, slots=True)
class DownConfig:
    """Tiles and crew of `sorted_down`.

    `half_stores`: C leaves by halves of a tile, so that its staging needs half the shared memory. A tile of block-wise
    float8 over two scale groups always does.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    persistent: bool = True
    programs_per_sm: int = 1
    half_stores: bool = False

    def __str__(self) -> str:
        return _tile(self)


LONGEST_K = 512
"""Of a down GEMM whose program keeps its rows of A."""


@dataclass(frozen=True, slots=True)
class ShortKDownConfig:
    """Tiles of `short_down`, and how many of them along N one program takes with the rows of A that it keeps."""

    block_m: int
    block_n: int
    block_k: int
    tiles_per_program: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_k} w{self.num_warps} s{self.num_stages}"
        return f"{tile} A kept for {self.tiles_per_program} tiles"


Up = TileConfig | UpConfig
"""The engine's up GEMM with that configuration, or ours, which may be fused with the activation."""

Down = DownConfig | ShortKDownConfig


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """Rows stay in the order of the experts from the up GEMM to the last sum.

    They are sorted into blocks of the up GEMM's `block_m`, which the down GEMM's divides.
    """

    up: Up
    down: Down

    @property
    def block_m(self) -> int:
        """Rows of a block of the sort."""
        return self.up.block_m

    def __str__(self) -> str:
        engines = "engine's " if isinstance(self.up, TileConfig) else ""
        return f"KERNEL up {engines}{self.up}, down {self.down}"


def _tile(config: UpConfig | DownConfig) -> str:
    tile = f"{config.block_m}x{config.block_n}x{config.block_k} G{config.group_m}"
    crew = f"persistent x{config.programs_per_sm}" if config.persistent else "one tile each"
    halves = " half stores" if config.half_stores else ""
    return f"{tile} w{config.num_warps} s{config.num_stages} {crew}{halves}"
