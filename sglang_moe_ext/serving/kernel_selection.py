"""Select the kernel plan of a layer for a number of tokens, from the `.paths.json` files beside our tables."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from sglang_moe_ext import env
from sglang_moe_ext.core import MoEShape, TableError
from sglang_moe_ext.engines import running_engine
from sglang_moe_ext.engines.lookup_args import LookupLayer
from sglang_moe_ext.engines.sglang import table_names
from sglang_moe_ext.few_tokens_config import FIRST_SM as FIRST_SM_OF_FEW
from sglang_moe_ext.few_tokens_config import FewTokensConfig, refusals
from sglang_moe_ext.kernel_plans import (
    FIRST_SM,
    KernelPlan,
    Plan,
    few_tokens_problem,
    why_not_warp_specialized,
    why_unsupported,
)
from sglang_moe_ext.serving.table_search import FoundTables, TableDir, is_made_for
from sglang_moe_ext.serving.table_selection import SATURATED_TOKENS
from sglang_moe_ext.tables import plan_table
from sglang_moe_ext.tables.plan_table import KernelEntry, KernelTable
from sglang_moe_ext.untrusted import show

log = logging.getLogger(__name__)

SHORTEST_US = 600.0
"""Outside of CUDA graphs, our kernels run only where the engine's layer takes the GPU at least this long.

The host needs 43 to 73 us more to launch ours than the engine's (H200, SGLang 0.5.15, Triton 3.6.0, 2026-11-21,
launch_cost). In a server whose prefill ran without CUDA graphs, a layer of 402 us lost by them and one of 686 us won
(docs/benchmarks/server.md). From a CUDA graph the host launches nothing, so that no limit is needed there."""
Weights = tuple[tuple[int, ...], tuple[int, ...]]
"""Shapes of w1 and w2, by which a layer's launches know it."""
ColdPlans = dict[Weights, tuple[Plan, ...]]
"""Plans whose kernels are not loaded yet, in the order of their numbers of tokens."""


@dataclass(frozen=True, slots=True)
class LayerPlans:
    """Plans of one layer by tokens: `eager` those that are worth their launches, `in_graphs` all that won."""

    eager: KernelTable
    in_graphs: KernelTable


def is_on() -> bool:
    return os.environ.get(env.KERNELS, "1") != "0"


class RunningEngine(Protocol):
    """What is asked of an engine that runs plans."""

    @property
    def triton(self) -> str | None: ...
    def is_deterministic(self) -> bool: ...
    def device_name(self) -> str | None: ...


class KernelPlans:
    """The kernel plans of one running engine. The tables of a layer are read at its first call.

    `is_hooked`: whether anything of ours stands where a plan would run.

    `tables_of` returns the tables that the layer's configurations come from. If the user named one of their folders to
    the engine, that folder decides, and none of our kernels runs.
    """

    def __init__(
        self,
        engine: RunningEngine,
        table_dirs: Callable[[], Sequence[TableDir]],
        tables_of: Callable[[LookupLayer], FoundTables | None],
        *,
        is_hooked: bool = True,
    ) -> None:
        self._is_hooked = is_hooked
        self._engine, self._table_dirs, self._tables_of = engine, table_dirs, tables_of
        self._tables: dict[LookupLayer, LayerPlans] = {}
        self._declined: set[Weights] = set()
        self.cold: ColdPlans = {}

    def select(self, layer: LookupLayer, tokens: int, *, in_graph: bool = False) -> Plan | None:
        """What runs in place of the engine's own kernels, before anything is known of the batch but its size.

        `in_graph`: launched from a CUDA graph, where it does not matter what a launch costs the host.
        """
        if (layer.w1_shape, layer.w2_shape) in self._declined or self._engine.is_deterministic():
            return None
        if layer not in self._tables:
            self._tables[layer] = self._load(layer)
        plans = self._tables[layer]
        return select_plan(plans.in_graphs if in_graph else plans.eager, tokens, layer.shape)

    def decline(self, w1_shape: tuple[int, ...], w2_shape: tuple[int, ...]) -> bool:
        """Never again choose our kernels for layers of such weights; False where that is so already."""
        is_new = (w1_shape, w2_shape) not in self._declined
        self._declined.add((w1_shape, w2_shape))
        self.cold.pop((w1_shape, w2_shape), None)
        return is_new

    def _load(self, layer: LookupLayer) -> LayerPlans:
        table = self._supported(layer)
        plans = tuple(dict.fromkeys(entry.plan for _, entry in sorted(table.items()) if entry.plan is not None))
        if plans:
            weights = layer.w1_shape, layer.w2_shape
            self.cold[weights] = tuple(dict.fromkeys((*self.cold.get(weights, ()), *plans)))
        return LayerPlans(drop_short(table), table)

    def _supported(self, layer: LookupLayer) -> KernelTable:
        shape, device_name, triton = layer.shape, self._engine.device_name(), self._engine.triton
        if not is_on() or not self._is_hooked or shape is None or device_name is None or triton is None:
            return {}
        gpu, tables = running_engine.running_gpu(device_name), self._tables_of(layer)
        is_asked_for = tables is not None and any(candidate.table_dir.is_asked_for for candidate in tables.candidates)
        if gpu is None or gpu.sm < FIRST_SM_OF_FEW or is_asked_for:
            return {}
        table = drop_unsupported(load_plans(shape, device_name, triton, self._table_dirs()), shape, gpu.sm, triton)
        won, eager = (_list_won(it) for it in (table, drop_short(table)))
        if won:
            where = "" if won == eager else f" (at M={', '.join(eager) or 'none'} outside of CUDA graphs)"
            log.info(
                "sglang-moe-ext: %s: our own kernels run at M=%s%s, where they are faster", shape, ", ".join(won), where
            )
        return table


def _list_won(table: KernelTable) -> list[str]:
    return [str(m) for m, entry in sorted(table.items()) if entry.plan is not None]


def load_plans(shape: MoEShape, device_name: str, triton: str, table_dirs: Sequence[TableDir]) -> KernelTable:
    """Read the plans for that layer, that very GPU and that very Triton; an earlier folder wins over a later one.

    A file that cannot be read is skipped with one log line: the engine's own kernels run.
    """
    found: KernelTable = {}
    for table_dir in reversed(table_dirs):
        name = table_dir.dialect.file_name(table_dir.dialect.key(shape, device_name))
        folder = table_dir.root if table_dir.is_flat else table_dir.root / table_names.version_folder(triton)
        file = plan_table.path_beside(folder / name)
        try:
            table = plan_table.read(file)
        except (TableError, OSError) as error:
            log.warning("sglang-moe-ext passes over a table of kernel plans: %s", error)
            continue
        made_for_it = {m: entry for m, entry in table.items() if is_made_for(entry.run.shape, shape)}
        if later := [str(m) for m, entry in sorted(made_for_it.items()) if entry.of_later is not None]:
            log.warning(
                "sglang-moe-ext: the engine's own kernels run at M=%s: the plans in %s are of a later version",
                ", ".join(later),
                show(str(file)),
            )
        found |= made_for_it
    return found


def drop_short(table: KernelTable) -> KernelTable:
    """The table without the plans of a layer that is below SHORTEST_US by the engine's kernels.

    A plan for few tokens stays: it launches twice, where the engine launches five times or more.
    """
    return {
        m: entry if isinstance(entry.plan, FewTokensConfig) or _is_long(entry) else replace(entry, plan=None)
        for m, entry in table.items()
    }


def drop_unsupported(table: KernelTable, shape: MoEShape, sm: int, triton: str) -> KernelTable:
    """The table without the plans that cannot run for that layer, GPU and Triton; one log line says why."""
    won = {m: entry for m, entry in table.items() if entry.plan is not None}
    if not won:
        return table
    why = why_unsupported(shape)
    if why is None:  # plans for few tokens ask for no more than their rules, which are read where one is selected
        won = {m: entry for m, entry in won.items() if isinstance(entry.plan, KernelPlan)}
        why = f"those behind its sort are for sm_{FIRST_SM} and newer" if won and sm < FIRST_SM else None
    if why is None:
        won = {m: it for m, it in won.items() if isinstance(it.plan, KernelPlan) and it.plan.is_warp_specialized}
        why = _why_not_warp_specialized(sm, triton) if won else None
    if why is None:
        return table
    at = ", ".join(map(str, sorted(won)))
    log.warning("sglang-moe-ext: %s: the engine's own kernels run at M=%s: %s", shape, at, why)
    return table | {m: replace(entry, plan=None) for m, entry in won.items()}


def _why_not_warp_specialized(sm: int, triton: str) -> str | None:
    """Imports Gluon where nothing else stands against it."""
    from sglang_moe_ext.kernels import warp_specialized_support

    return why_not_warp_specialized(sm, triton) or warp_specialized_support.why_not_importable()


def _is_long(entry: KernelEntry) -> bool:
    """Whether the engine's layer takes SHORTEST_US; where nothing is known of it, whether ours does."""
    return entry.figures.get("incumbent_us", entry.figures.get("us", 0.0)) >= SHORTEST_US


def select_plan(table: KernelTable, tokens: int, shape: MoEShape | None = None) -> Plan | None:
    """Return the nearest entry's plan if the entries on both sides of `tokens` have one of the same kind.

    Beyond the last entry, that entry decides alone, and only from SATURATED_TOKENS on. Where the rules of a plan for
    few tokens refuse this number, the other side's plan is returned, or none.
    """
    below = max((m for m in table if m <= tokens), default=None)
    above = min((m for m in table if m >= tokens), default=None)
    if below is None or (above is None and below < SATURATED_TOKENS):
        return None
    above = below if above is None else above
    nearest = below if tokens - below <= above - tokens else above
    sides = [table[m].plan for m in (nearest, below, above)]
    if all(isinstance(plan, KernelPlan) for plan in sides):
        return sides[0]
    if shape is None or not all(isinstance(plan, FewTokensConfig) for plan in sides):
        return None
    problem = few_tokens_problem(shape, tokens)
    return next((it for it in sides if isinstance(it, FewTokensConfig) and not refusals(it, problem)), None)
