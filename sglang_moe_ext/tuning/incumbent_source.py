"""Whose configuration an engine runs today: its default, a table of its own, or one of this package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from sglang_moe_ext.core import Origin, TableError
from sglang_moe_ext.engines.lookup_probe import LookupResult
from sglang_moe_ext.tables import config_table, provenance
from sglang_moe_ext.tuning import install_target
from sglang_moe_ext.tuning.request import TuneRequest


@dataclass(frozen=True, slots=True)
class TodaysSource:
    """Where the configuration at one number of tokens comes from, for people; `is_ours`: from this package.

    `origin`: how it came to be, None where that is not known; `elsewhere`: the other GPU or Triton that it is of.
    `gain`: how many times as fast as what ran before the layer was measured with it, None where that is not known.
    """

    text: str
    is_ours: bool
    origin: Origin | None = None
    elsewhere: str = ""
    gain: float | None = None


def sources(request: TuneRequest, answer: LookupResult) -> Mapping[int, TodaysSource]:
    """By number of tokens, from the files that the engine opened, or from what the plugin in it said."""
    name = install_target.table_names(request.adapter, request.shape, request.gpu.device_name)[False]
    file = next((file for file in answer.files if file.name == name), None)
    title = request.adapter.TITLE
    return {m: _source(title, file, m, answer.whys.get(m)) for m in answer.up}


def _source(title: str, file: Path | None, tokens: int, by_plugin: str | None) -> TodaysSource:
    if by_plugin is not None:
        gain = None if file is None else _measured_gain(file, tokens)
        text, _, rest = by_plugin.partition(", entry")
        stated, _, elsewhere = rest.partition("; ")[2].partition(", ")
        of_plugin = next((one for one in get_args(Origin) if one == stated), None)
        return TodaysSource(text, not by_plugin.startswith("the engine's"), of_plugin, elsewhere, gain)
    if file is None:
        return TodaysSource(f"{title}'s default", False)
    triton = file.parent.name.removeprefix("triton_").replace("_", ".") if "triton_" in file.parent.name else None
    made_with = "" if triton is None else f" for Triton {triton}"
    known = provenance.read(file)
    try:
        nearest = config_table.nearest(config_table.read(file), tokens)
    except TableError:
        return TodaysSource(f"a table{made_with}", False)
    origin = None if known is None else known.origin(nearest)
    if origin is None:
        return TodaysSource(f"a table{made_with} that {title} ships, or that was put there by hand", False)
    return TodaysSource(f"your {origin} table{made_with}", True, origin, gain=_measured_gain(file, tokens))


def _measured_gain(file: Path, tokens: int) -> float | None:
    """The figure of the entry that is taken for so many tokens."""
    known = provenance.read(file)
    entries = {} if known is None else {m: it for m, it in known.entries.items() if it.origin == "measured"}
    nearest = min(entries, key=lambda m: abs(m - tokens), default=None)
    return None if nearest is None else entries[nearest].figures.get("gain")


def describe(found: Mapping[int, TodaysSource]) -> list[str]:
    """A line for each source, with its numbers of tokens; and one where today is a table of this package already."""
    by_text: dict[str, list[int]] = {}
    for m, source in found.items():
        by_text.setdefault(source.text, []).append(m)
    lines = [f"today: {text} at M={_ranges(tokens, found)}" for text, tokens in by_text.items()]
    if found and all(source.is_ours for source in found.values()):
        lines.append("today is already a table of this package: a gain of 1.00x means that it stays")
    return lines


def _ranges(tokens: Iterable[int], everything: Iterable[int]) -> str:
    """1-64, 256: runs of neighbours among all numbers of tokens."""
    order = list(everything)
    runs: list[list[int]] = []
    for m in tokens:
        if runs and order.index(m) == order.index(runs[-1][-1]) + 1:
            runs[-1].append(m)
        else:
            runs.append([m])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
