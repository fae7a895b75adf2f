"""Prefill of a dummy model in one process, by the engine's kernels and by our paths, in turn.

usage, from the repository root: python -m benchmarks.prefill_paths MODEL [--tokens M] [--layers 8]

As `serving_speed`, which holds two processes, but free of what tells one process from another: both have the plugin,
its tables and its guard, and one has the engine's kernels run where a path was chosen. MODEL: one of dummy_model's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks import dummy_model
from benchmarks.serving import attached

TURNS, RUNS = 6, 8


def main() -> int:
    """Exit status: 0 done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=dummy_model.MODELS)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8)
    asked = parser.parse_args()
    attached.begin()
    engine = attached.engine_here()
    from benchmarks.serving.served_model import Plan, ServedModel
    from sglang_moe_ext.serving import attach
    from sglang_moe_ext.serving.sglang_lookup_hook import ConfigResolver

    with tempfile.TemporaryDirectory() as folder:
        dummy_model.write(Path(folder), asked.model, asked.layers)
        model = ServedModel(engine, Plan(folder, "spread", asked.tokens + 1024, (), 1))
    resolver = attach.sglang_resolver()
    assert isinstance(resolver, ConfigResolver)
    chooses = resolver.plan
    kinds: dict[str, Callable[..., object]] = {"our": chooses, "the engine's": lambda *_: None}
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(TURNS):
        for kind, chosen in kinds.items():
            resolver.plan = chosen  # type: ignore[method-assign,assignment]
            resolver.answers.clear()
            model.prefill_ms(asked.tokens, 0)
            taken[kind] += [model.prefill_ms(asked.tokens, 1 + turn * RUNS + run) for run in range(RUNS)]
    for kind, times in taken.items():
        print(f"{kind} kernels: {median(times):.2f} ms ({min(times):.2f} to {max(times):.2f}, {len(times)} runs)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
