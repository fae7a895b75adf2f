"""Servers side by side: the table, and one document for programs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.vs_upstream.report import Place
from sglang_moe_ext.engines.server_log import Said

Kind = Literal["stock", "plugin"]
_NOTHING = "-"


@dataclass(slots=True)
class Measured:
    """What one server gave, filled while it is measured.

    `ttft_ms`: by tokens of the prompt; `first_ms`: of the first prompt of that length, which counts for nothing else;
    `tokens_per_s`: by requests at once; `failure`: why there is no more.
    """

    kind: Kind
    start_s: float | None = None
    first_ms: dict[int, float] = field(default_factory=dict)
    ttft_ms: dict[int, list[float]] = field(default_factory=dict)
    tokens_per_s: dict[int, list[float]] = field(default_factory=dict)
    said: Said | None = None
    failure: str | None = None

    def document(self) -> dict[str, Any]:
        """For programs."""
        said = self.said
        return {
            "server": self.kind,
            "start_s": _rounded(self.start_s),
            "first_ms": {str(size): _rounded(ms) for size, ms in self.first_ms.items()},
            "ttft_ms": {str(size): [_rounded(ms) for ms in taken] for size, taken in self.ttft_ms.items()},
            "tokens_per_s": {str(size): [_rounded(it) for it in rates] for size, rates in self.tokens_per_s.items()},
            "plugin_active": None if said is None else said.is_active,
            "tables": [] if said is None else list(said.tables),
            "errors": [] if said is None else list(said.errors),
            "failure": self.failure,
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def wrongly_attached(measured: Measured) -> str | None:
    """What is wrong where stock has the plugin, or the plugin's server has not."""
    if measured.said is None or measured.said.is_active == (measured.kind == "plugin"):
        return None
    state = "is" if measured.said.is_active else "is not"
    return f"by the log of the {measured.kind} server the plugin {state} active"


def header(place: Place, model: str, layers: int, runs: int, batch_runs: int, weights: str) -> str:
    """Where, when, how."""
    return (
        f"{place.gpu.device_name}, SGLang {place.engine.version_text}, Triton {place.engine.triton}, {place.date}: "
        f"`{place.command}`\n\n"
        f"HTTP servers of {model}, {layers} layers, weights {weights}, one server after the "
        f"other. Medians of {runs} prompts, and of {batch_runs} batches; in brackets the least and the most."
    )


def table(servers: Sequence[Measured], prompts: Sequence[int], batches: Sequence[tuple[int, int, int]]) -> str:
    """A column for each server in the order that they ran; the ratio is of all stock runs and all with the plugin."""
    names = [_name(server, servers[:number]) for number, server in enumerate(servers)]
    rows = [
        f"| | {' | '.join(names)} | gain |",
        f"|---|{'---:|' * (len(names) + 1)}",
    ]
    for size in prompts:
        cells = [_ms(server.ttft_ms.get(size)) for server in servers]
        ratio = _ratio(_all("stock", servers, size), _all("plugin", servers, size))
        rows.append(f"| time to the first token of {size:,}, ms | {' | '.join(cells)} | {ratio} |")
    for requests, tokens, new in batches:
        cells = [_rate(server.tokens_per_s.get(requests)) for server in servers]
        rates = {
            kind: [it for server in servers if server.kind == kind for it in server.tokens_per_s.get(requests, [])]
            for kind in ("stock", "plugin")
        }
        ratio = _ratio(rates["plugin"], rates["stock"])
        rows.append(f"| {requests} requests of {tokens:,} in, {new} out, tokens/s | {' | '.join(cells)} | {ratio} |")
    for size in prompts:
        firsts = [_NOTHING if (ms := server.first_ms.get(size)) is None else f"{ms:.0f}" for server in servers]
        rows.append(f"| the first prompt of {size:,}, ms | {' | '.join(firsts)} | |")
    starts = [_NOTHING if server.start_s is None else f"{server.start_s:.0f}" for server in servers]
    rows.append(f"| start, s | {' | '.join(starts)} | |")
    return "\n".join(rows)


def remarks(servers: Sequence[Measured]) -> str:
    """What the servers said of the plugin, tables and errors, and why figures are missing."""
    lines: list[str] = []
    for number, server in enumerate(servers):
        said = server.said
        state = "unknown" if said is None else "active" if said.is_active else "not active"
        lines += ["", f"{_name(server, servers[:number])}: plugin {state}."]
        lines += [f"- WRONG: {wrong}" for wrong in [wrongly_attached(server)] if wrong]
        lines += [f"- failed: {server.failure}"] if server.failure else []
        lines += [] if said is None else [f"- {line}" for line in (*said.tables, *said.errors)]
    return "\n".join(lines[1:])


def _name(server: Measured, before: Sequence[Measured]) -> str:
    """Told apart from earlier ones of its kind."""
    again = sum(other.kind == server.kind for other in before)
    return f"{server.kind} {again + 1}" if again else server.kind


def _all(kind: Kind, servers: Sequence[Measured], size: int) -> list[float]:
    return [ms for server in servers if server.kind == kind for ms in server.ttft_ms.get(size, [])]


def _ratio(above: Sequence[float], below: Sequence[float]) -> str:
    if not above or not below:
        return _NOTHING
    return f"{statistics.median(above) / statistics.median(below):.3f}x"


def _ms(taken: Sequence[float] | None) -> str:
    if not taken:
        return _NOTHING
    return f"{statistics.median(taken):.1f} ({min(taken):.1f} to {max(taken):.1f})"


def _rate(rates: Sequence[float] | None) -> str:
    if not rates:
        return _NOTHING
    return f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"


def document(place: Place, layers: int, weights: str, tuned: str | None, servers: Sequence[Measured]) -> dict[str, Any]:
    """What `header`, `table` and `remarks` say."""
    return {
        "gpu": place.gpu.device_name,
        "engine": f"sglang {place.engine.version_text}",
        "triton": place.engine.triton,
        "date": place.date,
        "command": place.command,
        "layers": layers,
        "weights": weights,
        "tuned": tuned,
        "servers": [server.document() for server in servers],
    }
