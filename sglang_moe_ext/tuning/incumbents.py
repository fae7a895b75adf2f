"""The configurations that an engine runs for the layer today, which a run has to beat."""

from __future__ import annotations

from dataclasses import replace

from sglang_moe_ext.engines.lookup_probe import LookupResult
from sglang_moe_ext.tuning.bench.messages import Pair


def pairs_of(answer: LookupResult) -> dict[int, Pair]:
    """The configurations of both GEMMs; without a table for the down projection the engine runs the up projection's."""
    return {m: {"up": up, "down": answer.down[m] or replace(up, use_tma=False)} for m, up in answer.up.items()}
