"""Two children take turns at one case: only one works at a time, and who goes first alternates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.cases import WARM_UPS, Case
from sglang_moe_ext.tuning.search import statistics
from sglang_moe_ext.tuning.search.statistics import Interval

Run = Callable[[Case, int], float]
"""Milliseconds of a case as one child runs it; runs of one number have the same prompt."""


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of each run, in the order of the rounds: run r of both stood side by side."""

    case: Case
    stock: tuple[float, ...]
    plugin: tuple[float, ...]

    @property
    def gain(self) -> Interval:
        """How many times faster the plugin is, from the pairs of runs."""
        return statistics.gain(self.stock, self.plugin, 1)

    def document(self) -> dict[str, Any]:
        """For programs."""
        gain = self.gain
        return {
            "case": str(self.case),
            "stock_ms": [round(ms, 4) for ms in self.stock],
            "plugin_ms": [round(ms, 4) for ms in self.plugin],
            "gain": round(gain.value, 4),
            "gain_95": [round(gain.low, 4), round(gain.high, 4)],
        }


def take_turns(case: Case, stock: Run, plugin: Run, rounds: int) -> Times:
    """Both warmed up first, so that nothing is compiled in a run that counts."""
    for child in (stock, plugin):
        for number in range(WARM_UPS):
            child(case, number)
    taken: dict[Run, list[float]] = {stock: [], plugin: []}
    for number in range(rounds):
        for child in (stock, plugin) if number % 2 == 0 else (plugin, stock):
            taken[child].append(child(case, WARM_UPS + number))
    return Times(case, tuple(taken[stock]), tuple(taken[plugin]))
