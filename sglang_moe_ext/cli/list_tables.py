"""`sglang-moe-ext list`: which tables there are for this machine, and which of them a server takes."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from sglang_moe_ext.cli import console, engine_choice
from sglang_moe_ext.cli.command import Command
from sglang_moe_ext.core import Gpu, GpuError
from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.stock import inventory
from sglang_moe_ext.stock.inventory import BrokenTable, ListedTable
from sglang_moe_ext.tables import user_store

_COLUMNS = ("engine", "layer", "GPU", "Triton", "origin", "gain", "where", "taken by a server")


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    engine_choice.add_to(parser)
    parser.add_argument("--gpu", help="GPU whose tables are listed, such as H200 (default: this machine's, or all)")
    parser.add_argument("--all", action="store_true", help="list the tables that the engine itself ships as well")


def _gpu(named: str | None) -> Gpu | None:
    """Raises GpuError where one is named that is not known."""
    if named is not None:
        return find_gpu(named)
    try:
        return specs.detect()
    except GpuError:
        return None


def run(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """List the tables, and give the document of them.

    Raises:
        MoEExtError: the GPU is unknown, or an installed engine is.
    """
    gpu = _gpu(arguments.gpu)
    device = None if gpu is None else gpu.device_name.replace(" ", "_")
    found = [
        table
        for engine in ([arguments.engine] if arguments.engine else inventory.engines())
        for table in inventory.list_tables(engine, with_engines_own=arguments.all)
        if device is None or isinstance(table, BrokenTable) or table.key.device_name == device
    ]
    tables = [one for one in found if isinstance(one, ListedTable)]
    broken = [one for one in found if isinstance(one, BrokenTable)]
    _show(tables, broken)
    return {
        "store": str(user_store.root()),
        "tables": [_entry(table) for table in tables],
        "broken": [{"engine": one.engine, "file": str(one.path), "why": one.why} for one in broken],
    }


def _show(tables: Iterable[ListedTable], broken: Iterable[BrokenTable]) -> None:
    rows = [_row(table) for table in tables]
    if rows:
        title = f"tables; your own lie in {user_store.root()}"
        console.show(console.Grid(title, _COLUMNS, rows, frozenset(_COLUMNS) - {"gain"}))
        print("taken by a server: by the plugin's own rule; `sglang-moe-ext doctor` asks the engine itself")
    else:
        print(f"no table: `sglang-moe-ext tune` makes them, and {user_store.root()} keeps them")
    for one in broken:
        print(f"broken: {one.why}")


def _row(table: ListedTable) -> list[str]:
    origins = ", ".join(f"{origin} {count}" for origin, count in table.origins.items())
    layer = table.model or f"E={table.key.experts},N={table.key.intermediate_size}"
    gain = "-" if table.gain is None else f"{table.gain:.2f}x"
    where = "in the engine's folder" if table.where == "the engine's" else table.where.removeprefix("the ")
    gpu = table.key.device_name.removeprefix("NVIDIA_")
    return [ENGINES[table.engine].TITLE, layer, gpu, table.triton or "-", origins, gain, where, _taken(table)]


def _taken(table: ListedTable) -> str:
    if table.served is None:
        return "unknown: its layer or GPU is not stated"
    if not table.shadowed_by:
        return "yes"
    return f"{table.served} of {table.entries}; else {', '.join(table.shadowed_by)}"


def _entry(table: ListedTable) -> Mapping[str, Any]:
    return {
        "engine": table.engine,
        "file": str(table.path),
        "model": table.model,
        "shape": None if table.shape is None else str(table.shape),
        "gpu": table.key.device_name,
        "triton": table.triton,
        "origins": table.origins,
        "gain": None if table.gain is None else round(table.gain, 4),
        "where": table.where,
        "served": table.served,
        "shadowed_by": list(table.shadowed_by),
    }


COMMAND = Command(
    name="list",
    summary="list the tables there are for this machine, and which of them a server takes",
    description=(
        "List your own tables, those that this package ships and those that it wrote into SGLang or vLLM: the layer,\n"
        "GPU, Triton and origin of each, what it gains, and what a server takes instead where it is not taken."
    ),
    examples=(
        ("sglang-moe-ext list", "the tables for the GPU of this machine"),
        ("sglang-moe-ext list --gpu H200 --engine sglang", "for another GPU, and one engine"),
        ("sglang-moe-ext list --json", "for programs"),
    ),
    add_to=add_to,
    run=run,
)
