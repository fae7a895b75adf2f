"""Which plans for few tokens the tuner would choose: its own race in CUDA graphs, of layers whose pair is known.

usage, from the repository root: python -m benchmarks.few_tokens_plans [--layers NAME ...] [--tokens 1 2 4 8 16]
    [--rounds 24] [--seconds 170]

The pair of the engine is the fastest of its own and of what a server beside which this package is installed takes.
Then what `tune` does: contenders compiled by the pool, held against float32, raced in whole layers inside CUDA graphs,
confirmed. After `--seconds`, no further layer is begun. "narrow": the plan with float8 multiplied as float16.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from benchmarks.kernel_plans import LAYERS, KnownPairs, Measure, jobs_of_pairs, known_pairs
from benchmarks.plan_bench import LayersSetup, OfLayer
from benchmarks.vs_upstream.report import here
from sglang_moe_ext.core import EngineError, Failure, MoEExtError
from sglang_moe_ext.engines.registry import SGLANG
from sglang_moe_ext.few_tokens_config import FewTokensConfig
from sglang_moe_ext.kernel_plans import Plan, list_jobs
from sglang_moe_ext.tuning.bench.messages import BenchLayers, BenchRequest, BenchResult, LayerTimes, Runner
from sglang_moe_ext.tuning.bench.worker import BenchProcess
from sglang_moe_ext.tuning.compile.cache import CompileCache
from sglang_moe_ext.tuning.compile.kernel_source import kernel_source
from sglang_moe_ext.tuning.compile.pool import CompilePool
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.search import candidates, few_tokens_space, statistics
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice

TOKENS = (1, 2, 4, 8, 16)
_SCREENED_ROUNDS = 6
HEADER = """\
| layer | M | engine us | ours us | ratio | 95 % | error | narrow us | chosen |
|---|---:|---:|---:|---:|---|---:|---:|---|"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 an error in one line, 2 usage."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS)[:4], metavar="NAME")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), metavar="M")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=170.0)
    try:
        _run(parser.parse_args(given), shlex.join(["python", "-m", "benchmarks.few_tokens_plans", *given]))
    except MoEExtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(arguments: argparse.Namespace, command: str) -> None:
    place, began = here(command), time.monotonic()
    print(f"{place.gpu.device_name}, SGLang {place.engine.version_text}, Triton {place.engine.triton}, {place.date}")
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(2) as asking,
        CompilePool(kernel_source(place.engine, SGLANG), cache=CompileCache(None), triton_cache=Path(folder)) as pool,
    ):
        process = BenchProcess(cast("Any", LayersSetup(Path(folder))), timeout_s=OfLayer.TIME_LIMIT_S)
        try:
            problems = {name: Problem(LAYERS[name], place.gpu, "sglang") for name in arguments.layers}
            known = {name: asking.submit(_ask, pool, it, arguments.tokens) for name, it in problems.items()}
            for name, problem in problems.items():
                if time.monotonic() - began > arguments.seconds:
                    print(f"{name}: not begun, {arguments.seconds:.0f} s are over", flush=True)
                    continue
                pairs = known[name].result()
                for job in jobs_of_pairs(problem, pairs, arguments.tokens):
                    pool.result(job)
                for m in arguments.tokens:
                    rows += raced(name, problem, m, pairs, cast("Measure", process.measure), pool, arguments.rounds)
                print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        finally:
            process.close()
    print(f"{json.dumps(rows)}\n\n{HEADER}")
    print("\n".join(_cells(row) for row in rows))
    print(f"`{command}`")


def _ask(pool: CompilePool, problem: Problem, tokens: Sequence[int]) -> KnownPairs:
    pairs = known_pairs(problem.shape, tokens, ())
    pool.want(jobs_of_pairs(problem, pairs, tokens))
    pool.want(job for m in tokens for job in few_tokens_space.jobs(problem, m))
    narrow = [_narrow(plan) for m in tokens for plan in few_tokens_space.contenders(problem, m)]
    pool.want(job for m in tokens for plan in narrow for job in list_jobs(plan, problem.shape, m, problem.gpu.sm))
    return pairs


def _narrow(plan: FewTokensConfig) -> FewTokensConfig:
    return replace(plan, wide_range=False)


def raced(
    name: str, problem: Problem, m: int, pairs: KnownPairs, ask: Measure, pool: CompilePool, rounds: int
) -> list[dict[str, Any]]:
    """One row; none, and a line that says why, where nothing was measured."""

    def measure(request: BenchRequest) -> BenchResult:
        return cast("BenchResult", ask(OfLayer(problem.shape, request)))

    def clean(plan: Plan) -> Failure | None:
        jobs = list_jobs(plan, problem.shape, m, problem.gpu.sm)
        troubles = (candidates.misfit(job, pool.result(job), problem.gpu) for job in jobs)
        return next((trouble for trouble in troubles if trouble is not None), None)

    def times(runners: Sequence[Runner], count: int) -> list[float]:
        found = measure(BenchLayers(m, tuple(runners), count, in_graph=True))
        if not isinstance(found, LayerTimes):
            raise EngineError(f"{name}, M={m}: {found}")
        return [statistics.typical_us(us, found.routings) for us in found.us]

    try:
        us = times(pairs.distinct, _SCREENED_ROUNDS)
        pair = pairs.distinct[us.index(min(us))]
        found = few_tokens_space.compare_plans(problem, m, pair, measure, clean, rounds=rounds)
        if found is None:
            raise EngineError(f"{name}, M={m}: nothing ran right")
        return [_row(name, m, found, _narrow_us(found, times, rounds))]
    except EngineError as error:
        print(error, flush=True)
        return []


def _narrow_us(found: MeasuredChoice[Runner], times: Any, rounds: int) -> float | None:
    plan = found.pair
    if not isinstance(plan, FewTokensConfig) or not plan.wide_range:
        return None
    wide, narrow = times([plan, _narrow(plan)], rounds)
    return float(found.us * narrow / wide)


def _row(name: str, m: int, found: MeasuredChoice[Runner], narrow_us: float | None) -> dict[str, Any]:
    plan = found.pair
    return {
        "layer": name, "m": m, "engine_us": found.incumbent_us, "us": found.us, "error": found.error,
        "gain": [found.gain.value, found.gain.low, found.gain.high], "narrow_us": narrow_us,
        "chosen": str(plan) if isinstance(plan, FewTokensConfig) else "the engine's",
    }  # fmt: skip


def _cells(row: dict[str, Any]) -> str:
    ratio, low, high = row["gain"]
    narrow = "" if row["narrow_us"] is None else f"{row['narrow_us']:.1f}"
    cells = (
        row["layer"], str(row["m"]), f"{row['engine_us']:.1f}", f"{row['us']:.1f}", f"{ratio:.3f}x",
        f"{low:.3f} to {high:.3f}", f"{row['error']:.1e}", narrow, row["chosen"],
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
