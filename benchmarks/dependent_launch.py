"""What programmatic dependent launch is worth: the layers of `kernel_plans` with and without it, in turn.

usage, from the repository root, on a Hopper GPU: python -m benchmarks.dependent_launch [--layers NAME ...]
    [--batch-size M ...] [--rounds 24]

One plan of warp-specialized kernels for each layer. Cold L2 before each launch, uniform and Zipf routing in turn. Both
ways must give the same bits. Exit status 1 where they do not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.kernel_plans import LAYERS, TOKENS
from benchmarks.plan_bench import SEED
from sglang_moe_ext.core import MoEShape
from sglang_moe_ext.kernel_plans import KernelPlan, WarpSpecializedDown, WarpSpecializedUp
from sglang_moe_ext.tuning.bench import routing
from sglang_moe_ext.tuning.bench.gpu_bench import BenchSetup
from sglang_moe_ext.tuning.bench.timer import Stopwatch, cuda_queue


def plan_of(shape: MoEShape) -> KernelPlan:
    """One that is near the fastest at all of TOKENS."""
    down = WarpSpecializedDown("pair", stages=3) if shape.quantization.is_block_wise else WarpSpecializedDown()
    return KernelPlan(WarpSpecializedUp(), down)


@contextmanager
def without_it() -> Iterator[None]:
    """Within, each kernel is launched when all before it have ended."""
    from sglang_moe_ext.kernels import dependent_launch

    is_used, options = dependent_launch.is_used, dict(dependent_launch.OPTIONS)
    dependent_launch.is_used = lambda tensor: False
    dependent_launch.OPTIONS["launch_pdl"] = False
    try:
        yield
    finally:
        dependent_launch.is_used = is_used
        dependent_launch.OPTIONS.update(options)


def race(shape: MoEShape, tokens: Sequence[int], rounds: int) -> Iterator[tuple[int, float, float, bool]]:
    """(tokens, microseconds without, microseconds with, whether the bits are the same)."""
    import torch

    from sglang_moe_ext.engines import sorted_layer

    with tempfile.TemporaryDirectory() as folder:
        bench = BenchSetup(shape, routing.SOURCES["mixed"], SEED, Path(folder), "sglang")()
        layer, plan = bench.layer, plan_of(shape)
        for m in tokens:
            batch = layer.batch(m, SEED)
            tensors = [layer.whole(batch, turn) for turn in range(len(batch.routings))]

            def chained(turn: int, tensors: list[Any] = tensors) -> torch.Tensor:
                return sorted_layer.result(layer.engine, shape, tensors[turn % len(tensors)], plan)

            def unchained(turn: int, chained: Callable[[int], torch.Tensor] = chained) -> torch.Tensor:
                with without_it():
                    return chained(turn)

            same = all(torch.equal(chained(turn), unchained(turn)) for turn in range(len(tensors)))
            stopwatch = Stopwatch(cuda_queue())
            rows = stopwatch.rounds([unchained, chained], range(0, rounds, 2))
            # What comes second finds the GPU warmer.
            rows += [row[::-1] for row in stopwatch.rounds([chained, unchained], range(1, rounds, 2))]
            without, with_it = (median(row[at] for row in rows) for at in range(2))
            yield m, without, with_it, same


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status as the module says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), metavar="NAME")
    parser.add_argument("--batch-size", nargs="+", type=int, default=list(TOKENS), metavar="M")
    parser.add_argument("--rounds", type=int, default=24)
    asked = parser.parse_args(arguments)
    all_same = True
    print("| layer | M | without us | with us | gain | same bits |\n|---|---:|---:|---:|---:|---|", flush=True)
    for name in asked.layers:
        for m, without, with_it, same in race(LAYERS[name], asked.batch_size, asked.rounds):
            print(f"| {name} | {m} | {without:.1f} | {with_it:.1f} | {without / with_it:.3f}x | {same} |", flush=True)
            all_same &= same
    return 0 if all_same else 1


if __name__ == "__main__":
    sys.exit(main())
