"""Measured tables that a server with our plugin would take for a layer, before any engine is asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sglang_moe_ext import package_data
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.tables import merge, user_store
from sglang_moe_ext.tables.merge import StoredTable
from sglang_moe_ext.tuning import install_target
from sglang_moe_ext.tuning.problem import Problem

_SHIPPED: dict[EngineName, str] = {"sglang": "configs", "vllm": "vllm"}
"""Folders in tuned_configs."""


def find_measured(problem: Problem) -> tuple[str, Path] | None:
    """A table for the layer that was measured, or may have been: whose it is, and its file.

    Raises:
        TableError: a file of that name is no table.
    """
    name = install_target.table_names(problem.adapter, problem.shape, problem.gpu.device_name)[False]
    for whose, folder in folders(problem.engine):
        stored = merge.read(folder / name)
        if stored is not None and stored.has_measured() and _is_for(stored, problem):
            return whose, folder / name
    return None


def folders(engine: EngineName) -> Iterator[tuple[str, Path]]:
    """Those of every Triton, the newest first: a server reads any of them."""
    shipped, own = package_data.folder("tuned_configs"), user_store.root_if_any()
    roots = {
        "in your own store": None if own is None else own / "tables" / engine,
        "shipped with this package": None if shipped is None else shipped / _SHIPPED[engine],
    }
    for whose, root in roots.items():
        if root is not None and root.is_dir():
            yield from ((whose, folder) for folder in sorted(root.glob("triton_*"), reverse=True))


def _is_for(stored: StoredTable, problem: Problem) -> bool:
    """Whether an entry was made for this hidden size and top-k, which no file's name tells; unknown counts as yes."""
    entries = {} if stored.provenance is None else stored.provenance.entries
    made_for = f",K={problem.shape.hidden_size},topk={problem.shape.top_k},"
    return not entries or any(made_for in entry.run.shape for entry in entries.values())
