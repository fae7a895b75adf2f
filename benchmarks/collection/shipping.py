"""Which rows of a collection ship, and their way into `tuned_configs/`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext.core import Table
from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.tables import config_table, merge, plan_table, provenance
from sglang_moe_ext.tables.merge import StoredTable
from sglang_moe_ext.untrusted import show

LEAST_GAIN = 1.02
"""A row ships where the lower end of some gain's 95 % interval reaches this."""
SHIPPED = {"sglang": "configs", "vllm": "vllm"}
"""The folder of an engine's tables within `tuned_configs/`."""


@dataclass(frozen=True, slots=True)
class Gain:
    """Over what the engine ran before, at one number of tokens, with the lower end of its 95 % interval.

    `us`: the whole layer; `floor_us`: its GEMMs at the roofline; `is_ours`: our own kernels won.
    """

    value: float
    low: float
    us: float
    floor_us: float
    relative_error: float
    is_ours: bool


def gains(table: Path) -> dict[int, Gain]:
    """By number of tokens, from the provenance of a measured up table and of the kernel plans beside it.

    Our kernels were compared with the new configuration, and that with the old one: the gains multiply.
    """
    known = provenance.read(table)
    plans = plan_table.read(plan_table.path_beside(table))
    found: dict[int, Gain] = {}
    for m, entry in ({} if known is None else known.entries).items():
        of = entry.figures
        if not {"us", "gain", "gain_low", "floor_us", "relative_error"} <= of.keys() or not math.isfinite(of["gain"]):
            continue
        plan = plans.get(m)
        won = plan.figures if plan is not None and plan.plan is not None else None
        scale = 1.0 if won is None else won["gain"]
        found[m] = Gain(
            of["gain"] * scale,
            of["gain_low"] * (1.0 if won is None else won["gain_low"]),
            of["us"] if won is None else won["us"],
            of["floor_us"],
            of["relative_error"] if won is None else won["relative_error"],
            won is not None,
        )
    return found


def is_worth_shipping(found: Mapping[int, Gain]) -> bool:
    """Whether the row beats what the engine ran before, beyond doubt, at some number of tokens."""
    return any(gain.low >= LEAST_GAIN for gain in found.values())


def up_tables(store: Path) -> list[tuple[str, Path]]:
    """The up tables in a row's store, each with its engine."""
    return [
        (engine, path)
        for engine in SHIPPED
        for path in sorted((store / "tables" / engine).glob("triton_*/*.json"))
        if config_table.is_up_table(path.name)
    ]


def put(engine: str, table: Path, tuned_configs: Path) -> str | None:
    """Copy the pair with all that is known of it; what stands against it, None where nothing does.

    Raises:
        MoEExtError: a file cannot be read or written.
    """
    place = tuned_configs / SHIPPED[engine] / table.parent.name / table.name
    if other := _other_layer(place, table):
        return f"its name is that of a shipped table of another layer, {show(other)}"
    down = table.with_name(f"{table.stem}_down.json")
    pair = [it for it in (table, down) if it.exists()]
    changes = {place.with_name(it.name): StoredTable(config_table.read(it), provenance.read(it)) for it in pair}
    pairs = [(place, place.with_name(down.name))] if len(pair) > 1 else []
    triton = table.parent.name.removeprefix("triton_").replace("_", ".")

    def text(of: Table) -> str:
        return ENGINES[engine].table_text(of, triton)  # type: ignore[index] # one of SHIPPED

    merge.put(changes, pairs, text)
    plans = plan_table.read(plan_table.path_beside(table))
    if any(entry.plan is not None for entry in plans.values()):
        plan_table.put(plan_table.path_beside(place), plans)
    return None


def _other_layer(place: Path, table: Path) -> str | None:
    """The layer of the table that ships under that name, where it is another: names tell neither K nor top-k."""
    there, ours = provenance.read(place), provenance.read(table)
    shapes = [{entry.run.shape for entry in it.entries.values()} if it else set() for it in (there, ours)]
    others = sorted(shapes[0] - shapes[1])
    return others[0] if others else None
