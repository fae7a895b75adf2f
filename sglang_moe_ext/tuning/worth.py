"""Before tuning: how much tuning and our own kernels could win at each M, of a layer and of a whole forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sglang_moe_ext.gpu import decoder_roofline
from sglang_moe_ext.gpu.decoder_roofline import Batch
from sglang_moe_ext.tuning import incumbent_source, kernel_gains
from sglang_moe_ext.tuning.incumbent_source import TodaysSource
from sglang_moe_ext.tuning.kernel_gains import KernelGain
from sglang_moe_ext.tuning.request import TuneRequest
from sglang_moe_ext.tuning.search.prediction_error import margin
from sglang_moe_ext.tuning.search.statistics import Interval
from sglang_moe_ext.tuning.tune_plan import PlanRow, TunePlan

Basis = Literal["measured now", "tuned already", "predicted", "unknown"]
"""Timed just now; today's entry was measured on this GPU before; ranked by the model; no engine was asked."""
DECODE_CONTEXT = 1024
"""Tokens that each sequence of a decode step is taken to have."""


@dataclass(frozen=True, slots=True)
class TuningGain:
    """How many times as fast the layer may become by tuning: certainly `low`, and `high` if all goes well.

    `low` is 1.0 where nothing is certain. `predicted` is what the model says, None where nobody knows what runs today.
    """

    basis: Basis
    low: float
    high: float
    predicted: float | None = None
    error: float = 1.0


@dataclass(frozen=True, slots=True)
class WorthRow:
    """One M. Microseconds of one layer's up and down GEMM, predicted; `today_us` None where today is not known.

    `moe_share`: of a forward pass, at most, as all else is taken to run at the roofline; None where that is not known.
    `kernels_run`: our kernels run there today.
    """

    tokens: int
    is_prefill: bool
    floor_us: float
    today_us: float | None
    source: TodaysSource | None
    tuning: TuningGain
    kernels: KernelGain | None
    kernels_run: bool
    moe_share: float | None

    def saved(self, gain: float) -> float | None:
        """The share of a forward pass that is saved, at most, where the layer becomes so many times as fast."""
        return None if self.moe_share is None else self.moe_share * (1 - 1 / gain)

    def saved_by_tuning(self) -> tuple[float, float] | None:
        """From what share to what share; None where that is not known."""
        least, most = self.saved(self.tuning.low), self.saved(self.tuning.high)
        return None if self.tuning.basis == "unknown" or least is None or most is None else (least, most)

    def saved_by_kernels(self) -> float | None:
        """None where nobody measured it, or where they run already."""
        return None if self.kernels is None or self.kernels_run else self.saved(self.kernels.value)


@dataclass(frozen=True, slots=True)
class Worth:
    """The estimate for one layer. `is_asked`: the engine said what runs today; else that is a guess, or unknown."""

    rows: tuple[WorthRow, ...]
    engine: str
    triton: str
    is_asked: bool

    def near(self, tokens: int, *, is_prefill: bool) -> WorthRow | None:
        """The row of that phase that is nearest to so many tokens."""
        rows = (row for row in self.rows if row.is_prefill == is_prefill)
        return min(rows, key=lambda row: abs(row.tokens - tokens), default=None)


def estimate(
    request: TuneRequest,
    plan: TunePlan,
    measured: Mapping[int, Interval],
    *,
    is_asked: bool,
    context: int = DECODE_CONTEXT,
) -> Worth:
    """The worth of tuning the layer of that request, from its plan.

    Args:
        plan: of the same request; it has the floor, today's choice and the best candidate at each M.
        measured: by M, gains of the plan's best candidates over today's choice that were timed on the GPU.
        is_asked: the engine said what runs today; else that is a guess, or unknown.
        context: tokens that each sequence of a decode step has.

    Raises:
        TableError: a file with the measured gains of our kernels is broken.
    """
    today = plan.today
    sources = {} if today is None else incumbent_source.sources(request, today)
    table = kernel_gains.find_kernel_table(request.problem)
    rows = tuple(
        WorthRow(
            tokens=row.tokens,
            is_prefill=row.tokens >= decoder_roofline.PREFILL_FROM,
            floor_us=row.floor_us,
            today_us=row.incumbent_us,
            source=sources.get(row.tokens),
            tuning=_tuning_gain(row, sources.get(row.tokens), measured.get(row.tokens)),
            kernels=kernel_gains.gain_at(table, row.tokens),
            kernels_run=today is not None and row.tokens in today.paths,
            moe_share=_share(request, row, context),
        )
        for row in plan.rows
    )
    return Worth(rows, request.adapter.TITLE, request.problem.triton, is_asked)


def _tuning_gain(row: PlanRow, source: TodaysSource | None, timed: Interval | None) -> TuningGain:
    gain, error = row.gain, margin(row.tokens)
    if timed is not None:
        is_faster = timed.low > 1
        return TuningGain("measured now", timed.low if is_faster else 1.0, max(1.0, timed.high), gain, error)
    if gain is None:
        return TuningGain("unknown", 1.0, 1.0, None, error)
    if source is not None and source.origin == "measured" and not _is_of_another_gpu(source):
        return TuningGain("tuned already", 1.0, 1.0, gain, error)
    return TuningGain("predicted", max(1.0, gain / error), max(1.0, gain), gain, error)


def _is_of_another_gpu(source: TodaysSource) -> bool:
    """A table of another Triton was measured on this GPU all the same."""
    return "made for" in source.elsewhere


def _share(request: TuneRequest, row: PlanRow, context: int) -> float | None:
    """Of the experts' two GEMMs in the time of all layers; by the best candidate's time, where today is not known."""
    around = request.surroundings
    if around is None:
        return None
    rest = decoder_roofline.decoder_floor(
        around,
        request.shape.quantization,
        request.gpu,
        Batch(row.tokens, context),
        shares_are_fused=request.shape.fused_shared > 0,
    )
    experts_us = around.moe_layers * (row.incumbent_us or row.best_us)
    return experts_us / (experts_us + rest.us)
