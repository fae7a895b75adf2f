"""Kernel plans: which of our kernels (`kernels/sorted_*.py`) run a fused-MoE layer, and with which tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sglang_moe_ext.core import MoEShape, Projection, TileConfig

FIRST_SM = 90
"""With TMA, and the matrix units that the kernels are written for."""


SCALE_GROUP = 128
"""Columns of a row, and rows and columns of weights, that share one scale of block-wise float8."""


@dataclass(frozen=True, slots=True)
class KernelLimit:
    """A layer that our kernels cannot run, or were never measured on. `why` completes "our kernels do not run: ..."."""

    why: str
    allows: Callable[[MoEShape], bool]


def _is_multiplied(shape: MoEShape) -> bool:
    quantization = shape.quantization
    is_scaled = quantization.per_channel or quantization.block_shape == (SCALE_GROUP, SCALE_GROUP)
    return quantization.scheme is None or (quantization.scheme == "fp8_w8a8" and is_scaled)


LIMITS = (
    KernelLimit("they multiply 16 bits, and float8 in blocks of 128 or per channel", _is_multiplied),
    KernelLimit("with expert parallelism they were never measured", lambda shape: shape.ep == 1),
    KernelLimit("their activation is SwiGLU", lambda shape: shape.gated),
    KernelLimit(
        f"their tiles take whole groups of {SCALE_GROUP} columns",
        lambda shape: not (shape.intermediate_size % SCALE_GROUP or shape.hidden_size % SCALE_GROUP),
    ),
)
"""What our kernels can do, by layer. The tuner and a server both read it."""


def why_unsupported(shape: MoEShape) -> str | None:
    """Why our kernels cannot run that layer, None where they can."""
    return next((limit.why for limit in LIMITS if not limit.allows(shape)), None)


@dataclass(frozen=True, slots=True)
class TileSchedule:
    """The tiles of a GEMM, and how its programs take them.

    Where `persistent`, `programs_per_sm` programs on each multiprocessor take tiles until none is left; else each
    program takes one tile.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    persistent: bool = True
    programs_per_sm: int = 1

    def __str__(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_k} G{self.group_m}"
        programs = f"persistent x{self.programs_per_sm}" if self.persistent else "one tile each"
        return f"{tile} w{self.num_warps} s{self.num_stages} {programs}"


@dataclass(frozen=True, slots=True)
class UpConfig(TileSchedule):
    """The tiles of `sorted_up`.

    Where `is_fused`, `block_n` are columns of the activations, which take twice as many of the weights; else of gate
    and up as they lie, which `half_stores` stores by halves of a tile.
    """

    is_fused: bool = True
    half_stores: bool = False

    def __str__(self) -> str:
        halves, fused = " half stores" if self.half_stores else "", " fused" if self.is_fused else ""
        return f"{TileSchedule.__str__(self)}{halves}{fused}"


@dataclass(frozen=True, slots=True)
class DownConfig(TileSchedule):
    """The tiles of `sorted_down`.

    `half_stores`: C leaves by halves of a tile, so that its staging needs half the shared memory. A tile of block-wise
    float8 over two scale groups always does.
    """

    half_stores: bool = False

    def __str__(self) -> str:
        return f"{TileSchedule.__str__(self)}{' half stores' if self.half_stores else ''}"


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


@dataclass(frozen=True, slots=True)
class SortedKernelJob:
    """The binaries to make of one half of a plan, as a layer launches them for `tokens` tokens on that architecture.

    Up: the GEMM with what precedes it and its activation; down: the GEMM and the sum. Rows are sorted into blocks of
    `block_m`.
    """

    shape: MoEShape
    projection: Projection
    config: Up | Down
    block_m: int
    tokens: int
    sm: int


def list_jobs(plan: KernelPlan, shape: MoEShape, tokens: int, sm: int) -> tuple[SortedKernelJob, SortedKernelJob]:
    """All binaries that a layer launches with that plan."""
    return (
        SortedKernelJob(shape, "up", plan.up, plan.block_m, tokens, sm),
        SortedKernelJob(shape, "down", plan.down, plan.block_m, tokens, sm),
    )
