"""Stock against plugin as markdown, and as one document for programs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.cases import DECODE_CONTEXT, STEPS
from benchmarks.serving.outputs import Agreement
from benchmarks.serving.turns import Times
from benchmarks.vs_upstream.report import Place


@dataclass(frozen=True, slots=True)
class Asked:
    """What of the command decides what the figures mean."""

    layers: int
    runs: int
    weights: str
    decode_graphs: bool


@dataclass(frozen=True, slots=True)
class Raced:
    """One model: times by case, outputs, what the children said of hooks and tables, and what attaching took."""

    model: str
    times: tuple[Times, ...]
    agreement: Agreement
    said: dict[str, tuple[str, ...]]
    attached_ms: float | None

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {
            "model": self.model,
            "times": [times.document() for times in self.times],
            "outputs": self.agreement.document(),
            "said": {name: list(lines) for name, lines in self.said.items()},
            "attached_ms": self.attached_ms,
        }


def header(place: Place, asked: Asked) -> str:
    """Where, when, how."""
    graphs = "replayed from CUDA graphs" if asked.decode_graphs else "without CUDA graphs"
    weights = "of the size that training starts with" if asked.weights == "spread" else "of the engine's dummy loader"
    return (
        f"{place.gpu.device_name}, SGLang {place.engine.version_text}, Triton {place.engine.triton}, {place.date}: "
        f"`{place.command}`\n\n"
        f"{asked.layers} layers, dummy weights {weights}; two processes on one GPU, one working at a time, "
        f"{asked.runs} runs of each case, in turn. Milliseconds of the whole model by the host's clock, median of "
        f"the runs. Prefill of one prompt without CUDA graphs; a decode run is the median of {STEPS} steps {graphs}, "
        f"{DECODE_CONTEXT} tokens of context at first."
    )


def table(raced: Raced) -> str:
    """Of one model."""
    rows = [
        f"## {raced.model}",
        "",
        "| case | stock ms | plugin ms | stock / plugin | 95 % | stock, min to max | plugin, min to max |",
        "|---|---:|---:|---:|---|---|---|",
        *(row(times) for times in raced.times),
        "",
        f"Logits of the plugin against stock, relative: after prefill {raced.agreement.prefill}; after a decode step "
        f"{raced.agreement.decode}. Stock against stock with another tile: {raced.agreement.other_tile}.",
        f"Experts that tokens take, in the layer where they are fewest: {raced.agreement.experts_taken} of "
        f"{raced.agreement.experts}.",
        "Attaching took "
        + ("a time that nobody measured." if raced.attached_ms is None else f"{raced.attached_ms:.1f} ms."),
    ]
    for name, lines in raced.said.items():
        rows += ["", f"Said by {name}:", *(f"- {line}" for line in lines or ("nothing",))]
    return "\n".join(rows)


def row(times: Times) -> str:
    """A line of the table."""
    gain = times.gain
    cells = (
        str(times.case),
        _ms(statistics.median(times.stock)),
        _ms(statistics.median(times.plugin)),
        f"{gain.value:.3f}x",
        f"{gain.low:.3f} to {gain.high:.3f}",
        _spread(times.stock),
        _spread(times.plugin),
    )
    return f"| {' | '.join(cells)} |"


def _ms(value: float) -> str:
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def _spread(taken: Sequence[float]) -> str:
    return f"{_ms(min(taken))} to {_ms(max(taken))}"


def document(place: Place, asked: Asked, raced: Sequence[Raced]) -> dict[str, Any]:
    """What `header` and the tables say."""
    return {
        "gpu": place.gpu.device_name,
        "engine": f"sglang {place.engine.version_text}",
        "triton": place.engine.triton,
        "date": place.date,
        "command": place.command,
        "layers": asked.layers,
        "weights": asked.weights,
        "decode_graphs": asked.decode_graphs,
        "models": [of_model.document() for of_model in raced],
    }
