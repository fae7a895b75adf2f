"""The comparison of the two commands as markdown, and as one document for programs."""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass

from benchmarks import racing
from benchmarks.racing import Outcome
from benchmarks.vs_upstream.effort import Effort
from benchmarks.vs_upstream.theirs import Layer, Task
from benchmarks.vs_upstream.timed_run import Run
from sglang_moe_ext.core import Failure, Gpu
from sglang_moe_ext.engines.sglang.installation import SglangInstallation


@dataclass(frozen=True, slots=True)
class Place:
    """Where, when and by which command the comparison is made."""

    gpu: Gpu
    engine: SglangInstallation
    date: str
    command: str


def here(command: str) -> Place:
    """Raises GpuError or EngineError where there is nothing to compare on."""
    gpu, engine = racing.here()
    return Place(gpu, engine, datetime.date.today().isoformat(), command)


def header(place: Place, task: Task, theirs: Layer) -> str:
    """What is compared, and where the two commands do not mean the same layer."""
    paragraphs = [
        f"{place.gpu.device_name}, SGLang {place.engine.version_text}, Triton {place.engine.triton}, {place.date}: "
        f"`{place.command}`",
        f"{task.model.name}, M={task.tokens}: {task.shape}",
    ]
    if not theirs.is_of(task.shape):
        paragraphs.append(f"Upstream's script tunes it as {theirs}.")
    return "\n\n".join(paragraphs)


def seconds(ours: Run, theirs: Effort) -> str:
    """From the start of each command to its end."""
    rows = [
        "| | upstream | ours | upstream / ours |",
        "|---|---:|---:|---:|",
        f"| seconds | {theirs.seconds:.1f} | {ours.seconds:.1f} | {theirs.seconds / ours.seconds:.1f}x |",
    ]
    if theirs.is_extrapolated:
        rows += [
            "",
            f"Upstream's seconds are extrapolated: it ran for {theirs.ran_s:.1f} s, start-up included, and tried "
            f"{theirs.tried} of its {theirs.whole} configurations; what it chose is the best of those.",
        ]
    return "\n".join(rows)


UPSTREAMS, OURS = "upstream's", "ours"
"""What a race calls the two choices."""


def choices(outcome: Outcome) -> str:
    """Of one race; the gain with its 95 % confidence interval."""
    rows = [
        "| choice | up | down | us of the layer | gain over today's | 95 % | error |",
        "|---|---|---|---:|---:|---|---:|",
    ]
    first = next(iter(outcome.by_name))
    for name, runner in outcome.by_name.items():
        us = f"fails: {runner.us.kind}" if isinstance(runner.us, Failure) else f"{outcome.us(name):.1f}"
        gain = outcome.gain(first, name)
        value, bounds = ("-", "-") if gain is None else (f"{gain.value:.3f}x", f"{gain.low:.3f} to {gain.high:.3f}")
        error = "-" if runner.error is None else f"{runner.error:.1e}"
        rows.append(f"| {name} | {runner.pair['up']} | {runner.pair['down']} | {us} | {value} | {bounds} | {error} |")
    if (ratio := outcome.gain(UPSTREAMS, OURS) if UPSTREAMS in outcome.by_name else None) is not None:
        rows += [
            "",
            f"Time of upstream's choice by that of ours: {ratio.value:.3f}x ({ratio.low:.3f} to {ratio.high:.3f}).",
        ]
    if outcome.throttled:
        rows += ["", f"The GPU slowed down during the race: {outcome.throttled}."]
    return "\n".join(rows)


def document(place: Place, task: Task, theirs: Layer) -> dict[str, object]:
    """What `header` says."""
    return {
        "gpu": place.gpu.device_name,
        "engine": f"sglang {place.engine.version_text}",
        "triton": place.engine.triton,
        "date": place.date,
        "command": place.command,
        "model": task.model.name,
        "M": task.tokens,
        "shape": str(task.shape),
        "upstream_shape": str(theirs),
    }


def results(ours: Run, theirs: Effort, outcome: Outcome) -> dict[str, object]:
    """What `seconds` and `choices` say."""
    return {
        "seconds": round(ours.seconds, 3),
        "upstream": asdict(theirs) | {"is_extrapolated": theirs.is_extrapolated},
        "ratio": round(theirs.seconds / ours.seconds, 3),
        "throttled": outcome.throttled,
        "choices": outcome.document(),
    }
