"""What a layer costs the host: the engine's own kernels against our path, both through the hooked engine.

usage, from the repository root, on a GPU: python -m benchmarks.launch_cost [--cases NAME ...] [--profile]

Calls are queued without waiting for the GPU, fewer than its queue holds, so that the time is the host's alone. Medians
of several rounds in turn. `--profile` says where the time of our path goes.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import path_modes

CALLS, ROUNDS = 40, 15


def host_us(call: Callable[[], Any]) -> float:
    """Of one call, the GPU idle before and not waited for."""
    import torch

    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(CALLS):
        call()
    taken_us = (time.perf_counter() - begun) / CALLS * 1e6
    torch.cuda.synchronize()
    return taken_us


def profiled(call: Callable[[], Any]) -> None:
    """Print what of our path takes the host's time."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(4):
        host_us(call)
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(30)


def main() -> int:
    """Exit status: 0 done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--cases", nargs="+", choices=path_modes.CASES, default=list(path_modes.CASES), metavar="NAME")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        os.environ["SGLANG_MOE_EXT_STORE"] = store
        module = path_modes.hooked(Path(store))
        for name in arguments.cases:
            case = path_modes.CASES[name]
            problem = path_modes.Problem(case, 1)
            batches = {"engine": problem.batch(case.engines_tokens), "ours": problem.inputs[0]}

            def call(batch: Any, problem: path_modes.Problem = problem) -> Any:
                return problem.run(module.outplace_fused_experts, batch)

            for batch in batches.values():
                call(batch)
            rounds = [{who: host_us(lambda batch=batch: call(batch)) for who, batch in batches.items()}  # type: ignore[misc]
                      for _ in range(ROUNDS)]  # fmt: skip
            engine, ours = (median(of[who] for of in rounds) for who in batches)
            print(f"{name}: host us of one layer: the engine's kernels {engine:.0f}, our path {ours:.0f}")
            if arguments.profile:
                profiled(lambda: call(problem.inputs[0]))  # noqa: B023 - called here
    return 0


if __name__ == "__main__":
    sys.exit(main())
