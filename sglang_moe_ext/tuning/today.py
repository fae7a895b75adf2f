"""What an engine runs for the layer today, at each M, and whose configuration that is."""

from __future__ import annotations

from dataclasses import replace

from sglang_moe_ext.engines.lookup_probe import LookupResult
from sglang_moe_ext.tuning.bench.messages import Pair


def pairs_of(answer: LookupResult) -> dict[int, Pair]:
    """The configurations of both GEMMs; without a table for the down projection the engine runs the up projection's."""
    return {m: {"up": up, "down": answer.down[m] or replace(up, use_tma=False)} for m, up in answer.up.items()}


def whose(answer: LookupResult, tokens: int) -> str:
    """Where the configuration at that M comes from.

    Our hooks say it where they decide: the user's table or the shipped one, its entry, measured or predicted. Else it
    is the table that the engine opened, with the Triton of its folder, or the engine's default.
    """
    if why := answer.whys.get(tokens):
        return why
    tables = [file for file in answer.files if not file.stem.endswith("_down")]
    if not tables:
        return "the engine's default"
    folder = tables[-1].parent.name
    return f"the engine's table, {folder}" if folder.startswith("triton_") else "the engine's table"
