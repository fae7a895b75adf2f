"""What a measuring process is asked, and what it answers: the whole language between a strategy and a GPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from sglang_moe_ext.core import CompileKey, Failure, Projection, TileConfig
from sglang_moe_ext.sorted_kernels import KernelPlan

Pair = dict[Projection, TileConfig]
"""The configurations of the up and the down GEMM; they share one BLOCK_SIZE_M."""
Runner = Pair | KernelPlan
"""What a layer can run: the engine's own kernels with a pair, or our path."""


def identity(runner: Runner) -> Hashable:
    """What makes two runners the same one."""
    return runner if isinstance(runner, KernelPlan) else (runner["up"], runner["down"])


def describe(runner: Runner) -> str:
    """As a log names it."""
    return str(runner) if isinstance(runner, KernelPlan) else f"up {runner['up']}, down {runner['down']}"


@dataclass(frozen=True, slots=True)
class BenchGemm:
    """Time one binary of one GEMM with each GROUP_SIZE_M. Answered by Screened.

    A group whose first sample takes longer than `limit_us` gets no second one; the first group's ends the screen.
    """

    tokens: int
    projection: Projection
    key: CompileKey
    groups: tuple[int, ...]
    samples: int
    limit_us: float | None = None


@dataclass(frozen=True, slots=True)
class BenchKernelPlan:
    """Time whole layers that run our path, which is compiled first. Answered by Screened, as of one group."""

    tokens: int
    path: KernelPlan
    samples: int


@dataclass(frozen=True, slots=True)
class GemmTimes:
    """Microseconds of each sample of each group, in the order of the groups."""

    us: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class BenchLayers:
    """Time whole layers in turn, each with its runner: align, quantize, up, activation, down, sum. Answered by Raced.

    `attempt` tells a race from a repetition of it; `data` is which inputs and routings it runs on.
    """

    tokens: int
    pairs: tuple[Runner, ...]
    rounds: int
    attempt: int = 0
    data: int = 0


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Microseconds of each pair in each round; round r takes routing r % `routings`.

    `throttled`: why the GPU slowed down meanwhile, None where it did not; `sm_clock_mhz`: of its multiprocessors at
    the end, None where nothing says.
    """

    us: tuple[tuple[float, ...], ...]
    routings: int
    throttled: str | None = None
    sm_clock_mhz: int | None = None


@dataclass(frozen=True, slots=True)
class CheckAccuracy:
    """Compare the layer's result with the reference: fresh inputs, poisoned outputs. Answered by Checked."""

    tokens: int
    pair: Runner


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Relative error of the layer against the float32 reference; infinite where a result is not finite."""

    error: float


BenchRequest = BenchGemm | BenchKernelPlan | BenchLayers | CheckAccuracy
BenchResult = GemmTimes | LayerTimes | Accuracy | Failure
Ask = Callable[[BenchRequest], BenchResult]
"""The GPU's side. A test passes a table, a resumed run its journal."""
