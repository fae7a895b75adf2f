"""Two runs beside each other: the M that both have, and what differs in their circumstances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_moe_ext.report.run_data import NOT_RECORDED, ReportedRun, TokensRow, mean_gain


@dataclass(frozen=True, slots=True)
class RunComparison:
    """`shared`: rows of A and of B at each M of both. `differences`: name, what A states, what B states."""

    shared: tuple[tuple[TokensRow, TokensRow], ...]
    differences: tuple[tuple[str, str, str], ...]
    warning: str | None

    @property
    def ratios(self) -> dict[int, float]:
        """By M, the tuned time of A over that of B."""
        return {a.m: a.tuned_us / b.tuned_us for a, b in self.shared if a.tuned_us and b.tuned_us}

    @property
    def mean_ratio(self) -> float | None:
        """The geometric mean of them, None where there is none."""
        return mean_gain(list(self.ratios.values()))


def compare(a: ReportedRun, b: ReportedRun) -> RunComparison:
    """What two runs have in common, and what not."""
    of_b = {row.m: row for row in b.rows}
    first, second = dict(a.environment), dict(b.environment)
    stated = ((name, first.get(name, NOT_RECORDED), second.get(name, NOT_RECORDED)) for name in first | second)
    warning = None
    if a.shape != b.shape or a.shape is None:
        warning = "the runs are of different layers, or do not state theirs: their times say nothing of each other"
    elif a.device_name.replace(" ", "_") != b.device_name.replace(" ", "_"):
        warning = "the runs are of different GPUs"
    return RunComparison(
        shared=tuple((row, of_b[row.m]) for row in a.rows if row.m in of_b),
        differences=tuple(one for one in stated if one[1] != one[2]),
        warning=warning,
    )


def document(found: RunComparison) -> Mapping[str, Any]:
    """The comparison for programs."""
    return {
        "warning": found.warning,
        "mean_a_over_b": None if found.mean_ratio is None else round(found.mean_ratio, 4),
        "entries": [
            {"m": a.m, "a_us": a.tuned_us, "b_us": b.tuned_us, "a_over_b": _rounded(found.ratios.get(a.m))}
            for a, b in found.shared
        ],
        "differences": [{"name": name, "a": a, "b": b} for name, a, b in found.differences],
    }


def _rounded(ratio: float | None) -> float | None:
    return None if ratio is None else round(ratio, 4)
