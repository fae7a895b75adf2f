"""`docs/benchmarks/collection.md`: every measured table that ships, and what a collection found not worth shipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.collection import shipping
from benchmarks.collection.shipping import Gain
from sglang_moe_ext.engines import table_names
from sglang_moe_ext.tables import config_table, provenance
from sglang_moe_ext.untrusted import show

BANDS = {"M up to 64": (1, 64), "96 to 512": (65, 1023), "1024 and more": (1024, 1 << 62)}
ALL_EXPERTS = 1024
"""Tokens from which on each expert is chosen; with fewer, Zipf routing reads fewer weights than the roofline counts."""
_HEAD = """# Tables that ship, and what they are worth

Made by `python -m benchmarks.tune_collection`: this page is written from the provenance of the
tables in `tuned_configs/`, and from the results of the newest collections. Gains are of whole
layers over what the engine runs without this package (its own table, or its default where it has
none), geometric means over the measured numbers of tokens M, cold L2, uniform and Zipf routing.
"Own kernels": the numbers of tokens at which the kernels of this package won; elsewhere the
engine's kernel runs with the tuned configuration. "Roof": the best share of the roofline of its
GEMMs that the layer reaches, from M=1024 on. "Error": the largest relative error against float32.
The date, the versions and the command of each entry stand in the provenance beside its table.
"""


@dataclass(frozen=True, slots=True)
class Unshipped:
    """A row of which nothing ships, and why."""

    engine: str
    gpu: str
    models: str
    shape: str
    why: str


def geometric_mean(values: Iterable[float]) -> float | None:
    """None of none."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _bands(found: Mapping[int, Gain]) -> list[str]:
    means = [
        geometric_mean(gain.value for m, gain in found.items() if low <= m <= high) for low, high in BANDS.values()
    ]
    return ["-" if mean is None else f"{mean:.3f}x" for mean in means]


def _row(table: Path) -> tuple[str, list[str]]:
    """The GPU, and the cells of one shipped table."""
    known, found = provenance.read(table), shipping.gains(table)
    assert known is not None
    runs = [entry.run for entry in known.entries.values()]
    models = ", ".join(dict.fromkeys(run.model for run in runs))
    ours = ", ".join(str(m) for m, gain in sorted(found.items()) if gain.is_ours)
    roof = max((gain.floor_us / gain.us for m, gain in found.items() if m >= ALL_EXPERTS), default=None)
    error = max(gain.relative_error for gain in found.values())
    date = max(run.date for run in runs)[:10]
    cells = [
        runs[-1].shape,
        models,
        *_bands(found),
        ours or "-",
        "-" if roof is None else f"{roof:.0%}",
        f"{error:.1e}",
        date,
    ]
    return table_names.parse(table.name).device_name, [show(cell, 400).replace("|", "/") for cell in cells]


def write(tuned_configs: Path, unshipped: Sequence[Unshipped]) -> str:
    """The page."""
    parts = [_HEAD]
    for engine, folder in shipping.SHIPPED.items():
        tables = [
            it for it in sorted((tuned_configs / folder).glob("triton_*/*.json")) if config_table.is_up_table(it.name)
        ]
        rows: dict[str, list[list[str]]] = {}
        for table in tables:
            gpu, cells = _row(table)
            rows.setdefault(gpu, []).append(cells)
        title = {"sglang": "SGLang", "vllm": "vLLM"}[engine]
        for gpu, of_gpu in sorted(rows.items()):
            heads = ["layer", "model", *BANDS, "own kernels at M", "roof", "error", "date"]
            parts.append(f"## {title}, {gpu.replace('_', ' ')}: {len(of_gpu)} layers\n")
            parts.append(_table(heads, of_gpu))
    if unshipped:
        parts.append("## Measured, and not shipped\n")
        parts.append(_table(["engine", "GPU", "models", "layer", "why"], [_cells(row) for row in unshipped]))
    return "\n".join(parts).rstrip("\n") + "\n"


def _cells(row: Unshipped) -> list[str]:
    return [show(it, 300).replace("|", "/") for it in (row.engine, row.gpu, row.models, row.shape, row.why)]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
