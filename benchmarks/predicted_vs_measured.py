"""Race, on this machine's GPU, three tables of one layer: the engine's choice today, ours predicted, ours measured.

usage: python benchmarks/predicted_vs_measured.py [MODEL] [M ...]     (installs nothing; prints a table in markdown)
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

from sglang_moe_ext import tune
from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines.sglang import installation
from sglang_moe_ext.roofline import pair_floor_us
from sglang_moe_ext.terminal import Bar
from sglang_moe_ext.tuning import on_gpu, pipeline, predict
from sglang_moe_ext.tuning.compile import compile_all
from sglang_moe_ext.tuning.compile_cache import CompileCache
from sglang_moe_ext.tuning.sources import kernel_source
from sglang_moe_ext.tuning.worker import Pair, Race, Setup, Worker

ROUNDS = 30


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("model", nargs="?", default="GLM-4.7-Flash")
    arguments.add_argument("tokens", nargs="*")
    asked = arguments.parse_args()
    flags = ["--model", asked.model, "--install", "none"]
    if asked.tokens:
        flags += ["--batch-size", *asked.tokens]
    request = tune.request_of(tune.parser().parse_args(flags), "benchmarks/predicted_vs_measured.py")
    engine = installation.find()
    started = time.monotonic()
    with Bar() as bar, tempfile.TemporaryDirectory() as triton_cache:
        answer = pipeline.ask_incumbents(request, engine, None, bar)
        if answer is None or not request.measure:
            raise EngineError("this needs a GPU, and SGLang beside it")
        today = pipeline.pairs_of(answer)
        plan = pipeline.plan_of(request, answer)
        source = kernel_source(engine)
        measured = on_gpu.measure_all(request, today, plan, source, bar)
        took = time.monotonic() - started

        def compiled(jobs):  # type: ignore[no-untyped-def]
            return compile_all(source, jobs, cache=CompileCache(None), triton_cache=Path(triton_cache))

        predicted = predict.table(plan.sifted.kept, request.shape, request.gpu, request.tokens, compiled)
        worker = Worker(Setup(request.shape, request.seed + 1, Path(triton_cache)))
        rows, regrets, gains = [], [], []
        for m in request.tokens:
            guess: Pair = {"up": predicted[m].config, "down": predicted[m].config}
            times = worker.ask(Race(m, (today[m], guess, measured[m].pair), ROUNDS))
            before, ours, best = map(statistics.median, times)
            floor = pair_floor_us(request.shape, request.gpu, m)
            regrets.append(ours / best)
            gains.append(before / best)
            rows.append(
                f"| {m} | {before:.1f} | {ours:.1f} | {best:.1f} | {before / best:.2f}x | {ours / best - 1:+.1%} "
                f"| {floor / best:.0%} | {guess['up']} | {measured[m].pair['up']} / {measured[m].pair['down']} |"
            )
        worker.close()
    print(f"{request.model} {request.shape} on {request.gpu.device_name}, {source.name}; measured in {took:.0f} s")
    times = ("today us", "predicted us", "measured us")
    columns = ("M", *times, "gain", "predicted loses", "of floor", "predicted", "measured")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    print("\n".join(rows))
    gain, regret = (math.exp(statistics.fmean(map(math.log, values))) for values in (gains, regrets))
    print(f"geometric means: gain {gain:.3f}x, the predicted table is slower than the measured by {regret - 1:.1%}")


if __name__ == "__main__":
    try:
        main()
    except EngineError as error:
        sys.exit(f"error: {error}")
