"""What a small card does with each layer, without and with the plugin, as markdown and as one document for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.serving.workloads import Workload
from benchmarks.vs_upstream.report import Place
from sglang_moe_ext.tuning.search.final_comparison import TOLERATED_ERROR

_LONGEST = 90
"""Characters of what the engine raised that fit a cell; the document has all of them."""


@dataclass(frozen=True, slots=True)
class Ran:
    """One M in one child: the configurations looked up and launched, up and down; `error` is relative, to float32."""

    looked_up: tuple[str, ...]
    launched: tuple[str, ...]
    error: float | None = None
    failure: str | None = None

    @classmethod
    def of(cls, answer: dict[str, Any]) -> Ran:
        """What the child answers."""
        return cls(
            tuple(answer["looked_up"]),
            tuple(answer["launched"]),
            answer.get("error_of_output"),
            answer.get("failure"),
        )

    def is_right(self, workload: Workload) -> bool:
        """It ran, and within what the dtype excuses."""
        return self.error is not None and self.error <= TOLERATED_ERROR[workload.shape.quantization.scheme]


@dataclass(frozen=True, slots=True)
class Row:
    """One M of a workload, without and with the plugin."""

    workload: Workload
    tokens: int
    stock: Ran
    plugin: Ran

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {
            "layer": self.workload.name,
            "shape": str(self.workload.shape),
            "configured_by": self.workload.configured_by,
            "M": self.tokens,
            "stock": asdict(self.stock),
            "plugin": asdict(self.plugin) | {"is_right": self.plugin.is_right(self.workload)},
        }


@dataclass(frozen=True, slots=True)
class Served:
    """A prefill of the whole model: milliseconds of the first run and the second, or what was raised."""

    ms: tuple[float, ...] = ()
    failure: str | None = None

    def __str__(self) -> str:
        if self.failure is not None:
            return f"fails: {_short(self.failure)}"
        return f"runs, {self.ms[-1]:.1f} ms"


def header(place: Place, limit: int) -> str:
    """Where, when, how."""
    return (
        f"{place.gpu.device_name}, SGLang {place.engine.version_text}, Triton {place.engine.triton}, {place.date}: "
        f"`{place.command}`\n\n"
        f"Simulated: Triton's device properties say {limit:,} B of shared memory a block, and no fused-MoE kernel that "
        f"needs more is loaded. The kernels are those of this GPU, and so is what they ask for."
    )


def table(rows: Sequence[Row]) -> str:
    """A line for each M."""
    lines = [
        "| layer | configured by | M | stock | plugin | asked for (up, down) | run by the plugin (up, down) | error |",
        "|---|---|---:|---|---|---|---|---:|",
    ]
    for row in rows:
        cells = (
            row.workload.name,
            row.workload.configured_by,
            f"{row.tokens:,}",
            _verdict(row.workload, row.stock),
            _verdict(row.workload, row.plugin),
            _pair(row.stock.looked_up),
            _pair(row.plugin.launched),
            "-" if row.plugin.error is None else f"{row.plugin.error:.1e}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdict(workload: Workload, ran: Ran) -> str:
    if ran.failure is not None:
        return f"fails: {_short(ran.failure)}"
    return "runs" if ran.is_right(workload) else "runs, and is WRONG"


def _pair(configs: Sequence[str]) -> str:
    """Both, or the one that both are."""
    return ", ".join(dict.fromkeys(configs)) or "-"


def _short(failure: str) -> str:
    line = " ".join(failure.split()).replace("|", "/")
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def document(place: Place, limit: int, rows: Sequence[Row], served: dict[str, Served]) -> dict[str, Any]:
    """What `header` and the tables say."""
    return {
        "gpu": place.gpu.device_name,
        "engine": f"sglang {place.engine.version_text}",
        "triton": place.engine.triton,
        "date": place.date,
        "command": place.command,
        "limit": limit,
        "rows": [row.document() for row in rows],
        "served": {name: asdict(of_child) for name, of_child in served.items()},
    }
