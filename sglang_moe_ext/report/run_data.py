"""What a report is about: one tuning run or one table, as values; None is what its source does not record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sglang_moe_ext.core import Gpu, MoEShape, Origin, Projection
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.tuning.search.statistics import Interval

SourceKind = Literal["journal", "table"]
NOT_RECORDED = "not recorded"


@dataclass(frozen=True, slots=True)
class KernelsRow:
    """Our own kernels at one M, against the engine's kernels with the tuned pair in the same comparison.

    `in_graph`: both were timed in CUDA graphs, whose times compare with each other alone. `plan` is None where the
    engine's kernels were as fast, or none of ours was tried; then there are no figures of ours.
    """

    plan: str | None
    us: float | None = None
    engine_us: float | None = None
    gain: Interval | None = None
    error: float | None = None
    in_graph: bool = False


@dataclass(frozen=True, slots=True)
class TokensRow:
    """One M. Times in microseconds, of the whole layer; `floor_us` and `predicted_us` of both GEMMs alone.

    `noise`: relative difference between two turns of stock. `throttled` is None where it is not recorded.
    """

    m: int
    origin: Origin | None
    up: str | None
    down: str | None
    stock: str | None = None
    stock_us: float | None = None
    tuned_us: float | None = None
    predicted_us: float | None = None
    floor_us: float | None = None
    gain: Interval | None = None
    noise: float | None = None
    error: float | None = None
    clock_mhz: float | None = None
    throttled: bool | None = None
    tried: int | None = None
    kernels: KernelsRow | None = None

    @property
    def best_us(self) -> float | None:
        """The faster of the tuned pair and our kernels, where both were timed in the same way."""
        if self.kernels is None or self.kernels.us is None or self.kernels.in_graph or self.tuned_us is None:
            return self.tuned_us
        return min(self.tuned_us, self.kernels.us)


@dataclass(frozen=True, slots=True)
class SpaceCell:
    """One binary of the search space, whatever its GROUP_SIZE_M.

    `dropped_by`: the rule that drops it, None where none does. `slowdown`: by GEMM, its time over the best at the M
    where it did best; a GEMM that it was not timed in is missing.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    dropped_by: str | None
    slowdown: Mapping[Projection, float]


@dataclass(frozen=True, slots=True)
class SpaceMap:
    """The whole search space. `dropped`: configurations by the rule that drops them first."""

    cells: tuple[SpaceCell, ...]
    configurations: int
    kept: int
    dropped: Mapping[str, int]
    why: Mapping[str, str]
    timed: int
    with_tma: int


@dataclass(frozen=True, slots=True)
class RegretRow:
    """How good the predicted order was at one M.

    `curve`: entry k-1 is the best measured time among the first k by the cost model over the best of all, less one.
    """

    m: int
    curve: tuple[float, ...]

    def after(self, count: int) -> float:
        """The regret of the first so many."""
        return self.curve[min(count, len(self.curve)) - 1]


@dataclass(frozen=True, slots=True)
class ReportedRun:
    """One run or table. `name` and the texts of `environment` are a stranger's: escape them.

    `tolerated_error`: the bound that a right result stays under. `notes`: what is missing, and why.
    """

    kind: SourceKind
    source: str
    name: str
    engine: EngineName | None
    triton: str | None
    shape: MoEShape | None
    gpu: Gpu | None
    device_name: str
    environment: tuple[tuple[str, str], ...]
    commands: tuple[str, ...]
    rows: tuple[TokensRow, ...]
    tolerated_error: float | None
    files: tuple[str, ...] = ()
    space: SpaceMap | None = None
    regret: tuple[RegretRow, ...] = ()
    notes: tuple[str, ...] = ()


def mean_gain(gains: Sequence[float]) -> float | None:
    """The geometric mean, None of nothing."""
    return math.exp(sum(map(math.log, gains)) / len(gains)) if gains else None


def tuned_gains(run: ReportedRun) -> dict[int, float]:
    """By M, how many times faster the tuned pair is than stock."""
    return {row.m: row.gain.value for row in run.rows if row.gain is not None}


def kernels_gains(run: ReportedRun) -> dict[int, float]:
    """By M, how many times faster our kernels are than the tuned engine, where they won."""
    return {row.m: row.kernels.gain.value for row in run.rows if row.kernels is not None and row.kernels.gain}
