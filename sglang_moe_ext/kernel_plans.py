"""Kernel plans: which of our kernels run a fused-MoE layer, with which tiles, and what these kernels can do."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from sglang_moe_ext.core import MoEShape, Projection, Target, TileConfig
from sglang_moe_ext.few_tokens_config import FewTokensConfig, FewTokensProblem

FIRST_SM = 90
"""With TMA, and the matrix units that the kernels are written for."""


MOST_SORTED_EXPERTS = 1023
"""Our sort counts the pairs of all experts in the registers of one program; with more, the engine's sort runs."""

SCALE_GROUP = 128
"""Columns of a row, and rows and columns of weights, that share one scale of block-wise float8."""


@dataclass(frozen=True, slots=True)
class KernelLimit:
    """A layer that our kernels cannot run. `why` completes "our kernels do not run: ..."."""

    why: str
    allows: Callable[[MoEShape], bool]


def _is_multiplied(shape: MoEShape) -> bool:
    quantization = shape.quantization
    has_whole_groups = not quantization.is_block_wise or quantization.block_shape == (SCALE_GROUP, SCALE_GROUP)
    return quantization.scales in quantization.row.sorted_kernels and has_whole_groups


LIMITS = (
    KernelLimit("they multiply 16 bits, and float8 in blocks of 128 or per channel", _is_multiplied),
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


def padded_rows(pairs: int, experts: int, block_m: int) -> int:
    """Rows that hold any routing of so many pairs of token and expert, sorted by expert, padded to blocks each."""
    return pairs + min(pairs, experts + 1) * (block_m - 1)


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


WARP_SPECIALIZED_ROWS = 128
"""Of a tile of the warp-specialized kernels, and of a block of the sort that they read."""


@dataclass(frozen=True, slots=True)
class WarpSpecializedUp:
    """Choices of `warp_specialized_up`, whose tile is 128 rows by 2 x 128 columns.

    Where `persistent`, one program a multiprocessor takes tile after tile; else each has one, which keeps tiles that
    share weights together in time: better where K is long.
    """

    STAGES: ClassVar[tuple[int, ...]] = (2, 3, 4)
    """With one stage a consumer would wait for the stage that it holds; five do not fit into shared memory."""

    group_m: int = 8
    stages: int = 4
    persistent: bool = True

    @property
    def block_m(self) -> int:
        return WARP_SPECIALIZED_ROWS

    def __str__(self) -> str:
        one_tile = "" if self.persistent else " one tile each"
        return f"warp-specialized 128x(2x128) G{self.group_m} s{self.stages}{one_tile}"


DownForm = Literal["wide", "pair"]


@dataclass(frozen=True, slots=True)
class WarpSpecializedDown:
    """Choices of `warp_specialized_down`.

    `form`: "wide" has tiles of 128x256; "pair", for block-wise float8 alone, has two programs a multiprocessor, with
    tiles of 128x128 and 3 stages at most.
    """

    STAGES: ClassVar[tuple[int, ...]] = WarpSpecializedUp.STAGES

    form: DownForm = "wide"
    group_m: int = 8
    stages: int = 4
    persistent: bool = True

    @property
    def block_m(self) -> int:
        return WARP_SPECIALIZED_ROWS

    def __str__(self) -> str:
        tile = "128x256" if self.form == "wide" else "2 CTAs of 128x128"
        return f"warp-specialized {tile} G{self.group_m} s{self.stages}{'' if self.persistent else ' one tile each'}"


WARP_SPECIALIZED_SM = 90
"""wgmma and setmaxnreg are Hopper's alone."""
OLDEST_GLUON_TRITON, FIRST_UNTRIED_TRITON = (3, 6), (3, 9)
"""Compiled and tested with 3.6.0, 3.7.1 and 3.8.0. Gluon is experimental: a name may change in any release."""


def why_not_warp_specialized(sm: int, triton_version: str) -> str | None:
    """None where the warp-specialized kernels can be tried, else the reason, for a log line.

    Ask `warp_specialized_support.why_not_importable` next.
    """
    if sm != WARP_SPECIALIZED_SM:
        return f"the warp-specialized kernels are for sm_{WARP_SPECIALIZED_SM}, this GPU is sm_{sm}"
    found = re.match(r"(\d+)\.(\d+)", triton_version)
    if found is None or not OLDEST_GLUON_TRITON <= (int(found[1]), int(found[2])) < FIRST_UNTRIED_TRITON:
        return f"the warp-specialized kernels were tested with Triton 3.6 to 3.8, this is {triton_version}"
    return None


Up = TileConfig | UpConfig | WarpSpecializedUp
"""The engine's up GEMM with that configuration, or ours, which may be fused with the activation."""

Down = DownConfig | ShortKDownConfig | WarpSpecializedDown


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

    @property
    def is_warp_specialized(self) -> bool:
        """Whether one of its kernels is in Gluon, which needs more of a GPU and of Triton than our others."""
        return isinstance(self.up, WarpSpecializedUp) or isinstance(self.down, WarpSpecializedDown)

    def __str__(self) -> str:
        engines = "engine's " if isinstance(self.up, TileConfig) else ""
        return f"KERNEL up {engines}{self.up}, down {self.down}"


Plan = KernelPlan | FewTokensConfig
"""What can run in place of the engine's own kernels: behind its sort, or straight from topk_ids."""


def few_tokens_problem(shape: MoEShape, tokens: int) -> FewTokensProblem:
    """What the rules of a plan for few tokens look at."""
    return FewTokensProblem(tokens, shape.top_k, shape.intermediate_size, shape.hidden_size, shape.quantization)


@dataclass(frozen=True, slots=True)
class SortedKernelJob:
    """The binaries to make of one half of a plan, as a layer launches them for `tokens` tokens on that architecture.

    Up: the GEMM with what precedes it and its activation; down: the GEMM and the sum. Rows are sorted into blocks of
    `block_m`; 0: the plan for few tokens does not sort, and its two launches are known by the whole of it.
    """

    shape: MoEShape
    projection: Projection
    config: Up | Down | FewTokensConfig
    block_m: int
    tokens: int
    sm: int

    @property
    def target(self) -> Target:
        return Target(self.sm)


def list_jobs(plan: Plan, shape: MoEShape, tokens: int, sm: int) -> tuple[SortedKernelJob, SortedKernelJob]:
    """All binaries that a layer launches with that plan."""
    if isinstance(plan, FewTokensConfig):
        return (
            SortedKernelJob(shape, "up", plan, 0, tokens, sm),
            SortedKernelJob(shape, "down", plan, 0, tokens, sm),
        )
    return (
        SortedKernelJob(shape, "up", plan.up, plan.block_m, tokens, sm),
        SortedKernelJob(shape, "down", plan.down, plan.block_m, tokens, sm),
    )
