"""What our own kernels were measured to gain for a layer on a GPU: the figures beside the tables, with their source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext.tables import plan_table
from sglang_moe_ext.tables.plan_table import KernelEntry, KernelTable
from sglang_moe_ext.tuning import install_target, known_tables
from sglang_moe_ext.tuning.problem import Problem

_FARTHEST = 2.0
"""A figure says something of the numbers of tokens within this ratio of the one that it was measured at."""


@dataclass(frozen=True, slots=True)
class KernelGain:
    """How many times as fast as the tuned pair of the engine's kernel our kernels were, measured at `tokens` tokens.

    1.0 where they lost, so that the engine's own run. `source`: GPU, engine, Triton and date of the measurement.
    """

    tokens: int
    value: float
    low: float
    high: float
    triton: str | None
    source: str


def find_kernel_table(problem: Problem) -> KernelTable:
    """The newest measurement of our kernels for that layer on that very GPU; empty where there is none.

    Raises:
        TableError: a file of that name is no table of kernel plans.
    """
    name = install_target.table_names(problem.adapter, problem.shape, problem.gpu.device_name)[False]
    made_for = f",K={problem.shape.hidden_size},topk={problem.shape.top_k},"
    for _, folder in known_tables.folders(problem.engine):
        found = plan_table.read(plan_table.path_beside(Path(folder, name)))
        of_layer = {m: entry for m, entry in found.items() if made_for in entry.run.shape}
        if of_layer:
            return of_layer
    return {}


def gain_at(table: KernelTable, tokens: int) -> KernelGain | None:
    """The figure of the nearest number of tokens; None where none is near, or nothing was compared there."""
    nearest = min(table, key=lambda m: (abs(m - tokens), m), default=None)
    if nearest is None or not tokens / _FARTHEST <= nearest <= tokens * _FARTHEST:
        return None
    return _gain(nearest, table[nearest])


def _gain(tokens: int, entry: KernelEntry) -> KernelGain | None:
    figures, run = entry.figures, entry.run
    if "gain" not in figures:
        return None
    value = figures["gain"] if entry.plan is not None else 1.0
    low, high = (figures.get(name, value) if entry.plan is not None else 1.0 for name in ("gain_low", "gain_high"))
    source = f"{run.gpu}, {run.engine}, Triton {run.triton}, {run.date[:10]}"
    return KernelGain(tokens, value, low, high, run.triton, source)
