"""The requests to a measuring process and its results: the whole language between a search strategy and a GPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import ClassVar

from sglang_moe_ext.core import CompileKey, Failure, Projection, TileConfig
from sglang_moe_ext.few_tokens_config import FewTokensConfig
from sglang_moe_ext.kernel_plans import KernelPlan

Pair = dict[Projection, TileConfig]
"""The configurations of the up and the down GEMM. Both share one BLOCK_SIZE_M."""


@dataclass(frozen=True, slots=True)
class LibraryLayer:
    """The whole layer by another library's kernels; `name`: a key of `engines.libraries.registry.LIBRARIES`."""

    name: str

    def __str__(self) -> str:
        return self.name


Runner = Pair | KernelPlan | FewTokensConfig | LibraryLayer
"""What a layer can run: the engine's own kernels with a pair, our kernels with a plan, or another library."""


def identity(runner: Runner) -> Hashable:
    """Equal for two runners that run the same kernels."""
    return (runner["up"], runner["down"]) if isinstance(runner, dict) else runner


def describe(runner: Runner) -> str:
    """The runner's name in a log."""
    return f"up {runner['up']}, down {runner['down']}" if isinstance(runner, dict) else str(runner)


@dataclass(frozen=True, slots=True)
class BenchGemm:
    """Time one binary of one GEMM with each GROUP_SIZE_M. The result is GemmTimes.

    A group whose first sample takes longer than `limit_us` gets no second sample; if it is the first group, the
    measurement ends there.
    """

    TIME_LIMIT_S: ClassVar[float] = 60.0

    tokens: int
    projection: Projection
    key: CompileKey
    groups: tuple[int, ...]
    samples: int
    limit_us: float | None = None


@dataclass(frozen=True, slots=True)
class BenchKernelPlan:
    """Time whole layers that run our kernels. The result is GemmTimes of one group."""

    TIME_LIMIT_S: ClassVar[float] = 180.0

    tokens: int
    plan: KernelPlan
    samples: int


@dataclass(frozen=True, slots=True)
class GemmTimes:
    """Microseconds of each sample of each group, in the order of the groups."""

    us: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class BenchLayers:
    """Time whole layers in turn, one for each runner: align, quantize, up, activation, down, sum.

    The result is LayerTimes. `attempt` tells a repetition from the first measurement; `data` selects the inputs and
    the routings. `in_graph`: as a server decodes, from CUDA graphs, each round over all routings.
    """

    TIME_LIMIT_S: ClassVar[float] = 300.0

    tokens: int
    pairs: tuple[Runner, ...]
    rounds: int
    attempt: int = 0
    data: int = 0
    in_graph: bool = False


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Microseconds of each runner in each round; round r uses routing r % `routings`.

    `throttled`: why the GPU slowed down during the measurement, None if it did not. `sm_clock_mhz`: clock of its
    multiprocessors at the end, None if unknown.
    """

    us: tuple[tuple[float, ...], ...]
    routings: int
    throttled: str | None = None
    sm_clock_mhz: int | None = None


@dataclass(frozen=True, slots=True)
class CheckAccuracy:
    """Compare the layer's output with the reference, on fresh inputs and poisoned buffers. The result is Accuracy.

    The reference quantizes activations where the runner does: a plan for few tokens keeps them in 16 bits.
    """

    TIME_LIMIT_S: ClassVar[float] = 300.0

    tokens: int
    pair: Runner


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Relative error of the layer against the float32 reference; infinite where the output is not finite."""

    error: float


BenchRequest = BenchGemm | BenchKernelPlan | BenchLayers | CheckAccuracy
"""Each kind states its TIME_LIMIT_S, after which the process is killed: a kernel that hangs never returns.

Seconds are enough, except for whole layers of many tokens on a slow GPU.
"""
BenchResult = GemmTimes | LayerTimes | Accuracy | Failure
Measure = Callable[[BenchRequest], BenchResult]
"""The GPU's side. A test passes a table, a resumed run its journal."""
