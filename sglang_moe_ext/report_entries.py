"""Tell of one result: its rows in a table for people, its entry in the document for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from sglang_moe_ext.core import Failure, MoEShape, TileConfig
from sglang_moe_ext.sorted_path import SortedPath
from sglang_moe_ext.store import path_tables, tables
from sglang_moe_ext.tuning.comparison import TODAY, Timed
from sglang_moe_ext.tuning.predict import Predicted
from sglang_moe_ext.tuning.questions import Pair, Runner
from sglang_moe_ext.tuning.rematch import Measured, is_right
from sglang_moe_ext.tuning.statistics import Interval

_LONGEST_REASON = 160
"""Characters of a failure in a table for people; the document has all."""


def predicted_row(tokens: int, result: Predicted, floor_us: float) -> list[str]:
    """The needs are the larger ones of both GEMMs."""
    needs = result.resources.values()
    smem, registers = max(need.smem_bytes for need in needs), max(need.registers for need in needs)
    return [str(tokens), str(result.config), f"{result.us:.1f}", f"{floor_us:.1f}", f"{smem} B", str(registers)]


def measured_rows(tokens: int, result: Measured[Pair], floor_us: float) -> list[list[str]]:
    """The incumbent above the choice, so that a terminal of 100 columns has room for both; once where it stays."""
    error = f"{result.error:.0e}"
    if result.pair == result.incumbent:
        return pair_rows(
            [str(tokens), "stays"], result.pair, [f"{result.us:.1f}", "", f"{floor_us / result.us:.0%}", error]
        )
    gain, had_us = result.gain, result.incumbent_us
    if math.isfinite(had_us):
        before = [f"{had_us:.1f}", "", f"{floor_us / had_us:.0%}", ""]
        interval = _interval(gain)
    else:
        before, interval = ["fails", "", "", ""], "now it runs"
    after = [f"{result.us:.1f}", interval, f"{floor_us / result.us:.0%}", error]
    return [
        *pair_rows([str(tokens), "before"], result.incumbent, before),
        *pair_rows(["", "after"], result.pair, after),
    ]


def path_rows(raced: Measured[Runner] | None, floor_us: float) -> list[list[str]]:
    """Our own path, below the pair that it beat; nothing where it did not."""
    if raced is None or not isinstance(raced.pair, SortedPath):
        return []
    up, down = raced.pair.up, raced.pair.down
    engines = "engine's " if isinstance(up, TileConfig) else ""
    figures = [f"{raced.us:.1f}", _interval(raced.gain), f"{floor_us / raced.us:.0%}", f"{raced.error:.0e}"]
    return [["", "kernel", f"up   {engines}{up}", *figures], ["", "", f"down {down}", *("" for _ in figures)]]


def pair_rows(left: list[str], pair: Pair, right: list[str]) -> list[list[str]]:
    """One row where both GEMMs take one configuration, else one for each."""
    if pair["up"] == pair["down"]:
        return [[*left, f"both {pair['up']}", *right]]
    return [
        [*left, f"up   {pair['up']}", *right],
        [*("" for _ in left), f"down {pair['down']}", *("" for _ in right)],
    ]


def compared_cells(shape: MoEShape, name: str, result: Timed | Failure) -> list[str]:
    """The time, the gain and the error."""
    if isinstance(result, Failure):
        return ["fails", "", _on_one_line(result)]
    over_today = "" if name == TODAY else "today fails" if result.gain is None else _interval(result.gain)
    if isinstance(result.error, Failure):
        error = f"unknown: {_on_one_line(result.error)}"
    else:
        error = f"{result.error:.0e}" + ("" if is_right(shape, result.error) else " WRONG")
    return [f"{result.us:.1f}", over_today, error]


def _on_one_line(failure: Failure) -> str:
    return " ".join(f"{failure.kind}: {failure.message}".split())[:_LONGEST_REASON]


def _interval(gain: Interval) -> str:
    return f"{gain.value:.2f}x [{gain.low:.2f}, {gain.high:.2f}]"


def measurement(tokens: int, result: Measured[Pair]) -> Mapping[str, Any]:
    """One M for programs; null where the incumbent cannot run, since JSON knows no infinity."""
    had_incumbent = math.isfinite(result.incumbent_us)
    return {
        "m": tokens,
        **pair_entry(result.pair),
        "us": round(result.us, 2),
        "incumbent_us": round(result.incumbent_us, 2) if had_incumbent else None,
        "gain": round(result.gain.value, 4) if had_incumbent else None,
        "low": round(result.gain.low, 4) if had_incumbent else None,
        "high": round(result.gain.high, 4) if had_incumbent else None,
        "noise": None if result.noise is None else round(result.noise, 5),
        "error": result.error,
        "tried": result.tried,
        "failures": dict(result.failures),
        "throttled": result.throttled,
    }


def raced_path(tokens: int, raced: Measured[Runner]) -> Mapping[str, Any]:
    """The race of one M between our own path and the chosen pair, for programs; `path` null where the pair won."""
    is_won = isinstance(raced.pair, SortedPath)
    return {
        "m": tokens,
        "path": path_tables.document_of(raced.pair) if isinstance(raced.pair, SortedPath) else None,
        "us": round(raced.us, 2),
        "pair_us": round(raced.incumbent_us, 2),
        "gain": round(raced.gain.value, 4) if is_won else None,
        "low": round(raced.gain.low, 4) if is_won else None,
        "high": round(raced.gain.high, 4) if is_won else None,
        "error": raced.error,
        "tried": raced.tried,
        "failures": dict(raced.failures),
    }


def compared_entry(shape: MoEShape, result: Timed | Failure) -> Mapping[str, Any]:
    """`failure` says why it does not run, or why it could not be checked; null where both could be done."""
    failed = result if isinstance(result, Failure) else result.error if isinstance(result.error, Failure) else None
    timed = result if isinstance(result, Timed) else None
    gain = None if timed is None else timed.gain
    error = None if timed is None or isinstance(timed.error, Failure) else timed.error
    return {
        "us": None if timed is None else round(timed.us, 2),
        "gain": None if gain is None else round(gain.value, 4),
        "low": None if gain is None else round(gain.low, 4),
        "high": None if gain is None else round(gain.high, 4),
        "error": error if error is not None and math.isfinite(error) else None,
        "right": error is not None and is_right(shape, error),
        "failure": None if failed is None else f"{failed.kind}: {failed.message}",
    }


def pair_entry(pair: Pair) -> Mapping[str, Any]:
    """Each GEMM's configuration, spelled as the engine does."""
    return {projection: _in_engines_spelling(config) for projection, config in pair.items()}


def _in_engines_spelling(config: TileConfig) -> Any:
    (entry,) = json.loads(tables.to_json({1: config})).values()
    return entry
