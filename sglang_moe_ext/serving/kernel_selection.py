"""At which numbers of tokens a layer runs our path: where tables beside ours, or the user's, say that it is faster."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from sglang_moe_ext import env
from sglang_moe_ext.core import MoEShape, TableError
from sglang_moe_ext.engines import running
from sglang_moe_ext.engines.lookup_args import LookupLayer
from sglang_moe_ext.engines.sglang import table_names
from sglang_moe_ext.engines.sglang.hook_points import SglangHookPoints
from sglang_moe_ext.serving.selection import SATURATED_TOKENS
from sglang_moe_ext.serving.table_search import FoundTables, TableDir, is_made_for
from sglang_moe_ext.sorted_kernels import FIRST_SM, KernelPlan
from sglang_moe_ext.tables import kernel_table
from sglang_moe_ext.tables.kernel_table import KernelEntry, KernelTable

log = logging.getLogger(__name__)

"""0 leaves the configurations to us, and the kernels to the engine."""
SHORTEST_US = 400.0
"""Of a layer by our path, which costs the host 285 to 395 us, 43 to 73 us more than the engine's kernels do: where the
GPU waits for the host, a faster kernel wins nothing (H200, SGLang 0.5.15, Triton 3.6.0, 2026-11-21, launch_cost)."""


def is_on() -> bool:
    return os.environ.get(env.KERNELS, "1") != "0"


class KernelPlans:
    """Of one running engine: reads the tables of a layer when it first asks.

    `shelf_of` a layer is what its configurations come from: where the user named a folder of them to the engine, that
    decides, and no path runs.
    """

    def __init__(
        self,
        engine: SglangHookPoints,
        places: Callable[[], Sequence[TableDir]],
        shelf_of: Callable[[LookupLayer], FoundTables | None],
    ) -> None:
        self._engine, self._places, self._shelf_of = engine, places, shelf_of
        self._tables: dict[LookupLayer, KernelTable] = {}
        self._declined: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()

    def of(self, layer: LookupLayer, tokens: int) -> KernelPlan | None:
        """What runs in place of the engine's own kernels, before anything is known of the batch but its size."""
        if (layer.w1_shape, layer.w2_shape) in self._declined or self._engine.is_deterministic():
            return None
        if layer not in self._tables:
            self._tables[layer] = self._table(layer)
        return select_plan(self._tables[layer], tokens)

    def decline(self, w1_shape: tuple[int, ...], w2_shape: tuple[int, ...]) -> bool:
        """Never again choose our path for layers of such weights; False where that is so already."""
        is_new = (w1_shape, w2_shape) not in self._declined
        self._declined.add((w1_shape, w2_shape))
        return is_new

    def _table(self, layer: LookupLayer) -> KernelTable:
        shape, device_name, triton = layer.shape(), self._engine.device_name(), self._engine.triton
        if not is_on() or self._engine.sequence is None or shape is None or device_name is None or triton is None:
            return {}
        gpu, shelf = running.running_gpu(device_name), self._shelf_of(layer)
        is_asked_for = shelf is not None and any(candidate.place.is_asked_for for candidate in shelf.candidates)
        if gpu is None or gpu.sm < FIRST_SM or is_asked_for:
            return {}
        table = load_plans(shape, device_name, triton, self._places())
        if won := [str(m) for m, entry in sorted(table.items()) if entry.path is not None]:
            log.info("sglang-moe-ext: %s: our own kernels run at M=%s, where they are faster", shape, ", ".join(won))
        return table


def load_plans(shape: MoEShape, device_name: str, triton: str, places: Sequence[TableDir]) -> KernelTable:
    """What the places say of that layer on that very GPU with that very Triton, the first of them last.

    What cannot be read is passed over, with a line: the engine's own kernels run, as they do where a layer is short.
    """
    name = table_names.file_name(table_names.table_key(shape, device_name))
    found: KernelTable = {}
    for place in reversed(places):
        file = kernel_table.path_beside(place.root / table_names.version_folder(triton) / name)
        try:
            table = kernel_table.read(file)
        except (TableError, OSError) as error:
            log.warning("sglang-moe-ext passes over a table of paths: %s", error)
            continue
        found |= {m: entry for m, entry in table.items() if is_made_for(entry.run.shape, shape)}
    return {m: entry if _is_long(entry) else replace(entry, path=None) for m, entry in found.items()}


def _is_long(entry: KernelEntry) -> bool:
    return entry.figures.get("us", 0.0) >= SHORTEST_US


def select_plan(table: KernelTable, tokens: int) -> KernelPlan | None:
    """The nearest entry's path, where those on both sides of that many tokens say that there is one.

    Behind the last entry, only where that is of so many tokens that more of them change nothing.
    """
    below = max((m for m in table if m <= tokens), default=None)
    above = min((m for m in table if m >= tokens), default=None)
    if below is None or (above is None and below < SATURATED_TOKENS):
        return None
    above = below if above is None else above
    nearest = below if tokens - below <= above - tokens else above
    return table[nearest].path if table[below].path and table[above].path else None
