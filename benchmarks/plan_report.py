"""The table of `benchmarks.kernel_plans`: what each runner takes at each M, and what that is in the mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any, Literal

from sglang_moe_ext.kernel_plans import KernelPlan
from sglang_moe_ext.tables import plan_table
from sglang_moe_ext.tuning.bench.messages import Pair, describe
from sglang_moe_ext.tuning.search.statistics import Interval

MANY_TOKENS = 1024
"""From here on our kernels are to win."""
PlanKind = Literal["Triton", "warp-specialized"]
PLAN_KINDS: tuple[PlanKind, ...] = ("Triton", "warp-specialized")


@dataclass(frozen=True, slots=True)
class PlanTimes:
    """One plan at one M. `gain` over the tuned engine; `error` against float32; `stages_us` of each stage alone."""

    plan: KernelPlan
    us: float
    gain: Interval
    error: float
    stages_us: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Row:
    """One M. Times in microseconds; `plans` has the kinds that run; `error` is the tuned engine's."""

    tokens: int
    tuned: Pair
    shipped_us: float
    tuned_us: float
    error: float
    plans: Mapping[PlanKind, PlanTimes]
    floor_us: float

    @property
    def best(self) -> PlanTimes:
        """The fastest of our plans."""
        return min(self.plans.values(), key=lambda plan: plan.us)


HEADER = """\
| M | as shipped us | tuned us | Triton plan us | warp-specialized us | tuned / Triton | tuned / warp-specialized \
| 95 % | of floor | error: tuned, Triton, warp-specialized | stages of the fastest plan, us | tuned | fastest plan |
|---:|---:|---:|---:|---:|---:|---:|---|---:|---|---|---|---|"""


def cells(row: Row) -> str:
    """One line of the table."""
    plans = [row.plans.get(kind) for kind in PLAN_KINDS]
    special = row.plans.get("warp-specialized")
    columns = (
        str(row.tokens),
        f"{row.shipped_us:.1f}",
        f"{row.tuned_us:.1f}",
        *("-" if plan is None else f"{plan.us:.1f}" for plan in plans),
        *("-" if plan is None else f"{plan.gain.value:.3f}x" for plan in plans),
        "-" if special is None else f"{special.gain.low:.3f} to {special.gain.high:.3f}",
        f"{row.floor_us / row.best.us:.0%}",
        ", ".join([f"{row.error:.2e}", *("-" if plan is None else f"{plan.error:.2e}" for plan in plans)]),
        ", ".join(f"{name} {us:.0f}" for name, us in row.best.stages_us.items()),
        describe(row.tuned),
        str(row.best.plan).removeprefix("KERNEL "),
    )
    return f"| {' | '.join(columns)} |"


def means(rows: Sequence[Row]) -> str:
    """Geometric means over the many tokens: of each kind of plan, and of a server that runs the fastest of all."""
    many = [row for row in rows if row.tokens >= MANY_TOKENS]
    if not many:
        return "no M is large enough for a mean"
    gains = {kind: [row.plans[kind].gain.value for row in many if kind in row.plans] for kind in PLAN_KINDS}
    of_kinds = [f"{kind} {geometric_mean(of_kind):.3f}x" for kind, of_kind in gains.items() if of_kind]
    served = geometric_mean(max(1.0, *(plan.gain.value for plan in row.plans.values())) for row in many)
    shipped = geometric_mean(row.shipped_us / min(row.best.us, row.tuned_us) for row in many)
    return (
        f"geometric means for M >= {MANY_TOKENS}, over the tuned engine: {', '.join(of_kinds)}, the fastest of all "
        f"{served:.3f}x, which is {shipped:.3f}x of the engine as shipped"
    )


def document(row: Row) -> dict[str, Any]:
    """For programs."""
    return {
        "m": row.tokens,
        "shipped_us": row.shipped_us,
        "tuned_us": row.tuned_us,
        "error": row.error,
        "floor_us": row.floor_us,
        "plans": {
            kind: {
                "us": plan.us,
                "gain": [plan.gain.value, plan.gain.low, plan.gain.high],
                "error": plan.error,
                "stages_us": dict(plan.stages_us),
                "path": plan_table.document_of(plan.plan),
            }
            for kind, plan in row.plans.items()
        },
    }
