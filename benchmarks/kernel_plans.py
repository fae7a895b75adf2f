"""Our kernel plans against the engine's layer, as shipped and tuned: whole layers in turn, and where the time goes.

usage, from the repository root: python -m benchmarks.kernel_plans [--layers NAME ...] [--batch-size M ...]
    [--rounds 24] [--as-on GPU ...] [--seconds 280]

As shipped: the engine's own lookup, without us. Tuned: the fastest of that, of what a server beside which this package
is installed takes with our kernels off, and of what both take on the GPUs of `--as-on`. Ours: the fastest plan in
Triton alone, and the fastest with a warp-specialized kernel, of those that the tuner tries. Cold L2 before each launch,
uniform and Zipf routing in turn, whole layers: sort, quantization, up, activation, down, sum. Binaries are compiled by
the compile pool; a launch that hangs costs a minute and its plan. After `--seconds`, no further layer is begun.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from benchmarks import plan_report
from benchmarks.plan_bench import LayersSetup, OfLayer, StageTimes, TimeStages
from benchmarks.plan_report import PlanKind, PlanTimes, Row
from benchmarks.vs_upstream.report import here
from sglang_moe_ext import env
from sglang_moe_ext.core import CompileJob, EngineError, Failure, Gpu, MoEExtError, MoEShape, Quantization
from sglang_moe_ext.engines.lookup_probe import LookupRequest
from sglang_moe_ext.engines.registry import SGLANG
from sglang_moe_ext.engines.sglang import lookup_probe
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.gpu.roofline import pair_floor_us
from sglang_moe_ext.kernel_plans import KernelPlan, WarpSpecializedDown, WarpSpecializedUp, list_jobs
from sglang_moe_ext.tuning.bench import messages
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchKernelPlan,
    BenchLayers,
    BenchRequest,
    CheckAccuracy,
    GemmTimes,
    LayerTimes,
    Pair,
    Runner,
)
from sglang_moe_ext.tuning.bench.worker import BenchLike, BenchProcess
from sglang_moe_ext.tuning.compile.cache import CompileCache
from sglang_moe_ext.tuning.compile.kernel_source import kernel_source
from sglang_moe_ext.tuning.compile.pool import CompilePool
from sglang_moe_ext.tuning.incumbents import pairs_of
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.search import candidates, sorted_kernel_space, statistics
from sglang_moe_ext.tuning.search.sorted_kernel_space import CleanPlan

_BLOCK = Quantization("fp8_w8a8", (128, 128))
LAYERS = {
    "Qwen3-30B-A3B fp8 block": MoEShape(128, 768, 2048, 8, _BLOCK),
    "DeepSeek-V3 TP8 fp8 block": MoEShape(257, 256, 7168, 9, _BLOCK, fused_shared=1),
    "Qwen3-30B-A3B bf16": MoEShape(128, 768, 2048, 8),
    "GLM-4.7-Flash bf16": MoEShape(65, 1536, 2048, 5, fused_shared=1),
    "Qwen3-30B-A3B fp8 channel": MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", per_channel=True)),
}
EP_LAYERS = {f"Qwen3-30B-A3B fp8 block EP{ep}": MoEShape(128 // ep, 768, 2048, 8, _BLOCK, ep=ep) for ep in (2, 4, 8)}
TOKENS = (1024, 2048, 4096, 8192, 16384)
COMPILED_AT = 4096
"""The binaries of a plan do not change between the numbers of tokens that are raced."""
_SCREENED_ROUNDS, _SAMPLES = 8, 4
_A = TypeVar("_A", LayerTimes, Accuracy, StageTimes, GemmTimes)
Measure = Callable[[OfLayer], object]
"""The GPU's side; a test passes a table."""


@dataclass(frozen=True, slots=True)
class LayerRace:
    """One layer on this GPU. `clean` waits for the binaries of a plan, and says what stands against them."""

    problem: Problem
    measure: Measure
    clean: CleanPlan

    def ask(self, request: BenchRequest | TimeStages) -> Any:
        return self.measure(OfLayer(self.problem.shape, request))

    def answered(self, request: BenchRequest | TimeStages, kind: type[_A]) -> _A:
        """Raises EngineError where it fails."""
        answer = self.ask(request)
        if not isinstance(answer, kind):
            raise EngineError(f"{request}: {answer}")
        return answer

    def run(self, tokens: int, shipped: Pair, known: Sequence[Pair], rounds: int) -> Row:
        """All in turn.

        Raises:
            EngineError: none of our plans runs, or the engine's own layer does not.
        """
        tuned = self._fastest(tokens, [shipped, *known])
        plans = self._fastest_plans(tokens, tuned)
        raced = self.answered(BenchLayers(tokens, (shipped, tuned, *plans.values()), rounds), LayerTimes)
        shipped_us, tuned_us, *plans_us = (statistics.typical_us(us, raced.routings) for us in raced.us)
        return Row(
            tokens,
            tuned,
            shipped_us,
            tuned_us,
            error=self._error(tokens, tuned),
            plans={
                kind: PlanTimes(
                    plan,
                    us,
                    statistics.gain(raced.us[1], samples, raced.routings),
                    self._error(tokens, plan),
                    self.answered(TimeStages(tokens, plan), StageTimes).us,
                )
                for (kind, plan), us, samples in zip(plans.items(), plans_us, raced.us[2:], strict=True)
            },
            floor_us=pair_floor_us(self.problem.shape, self.problem.gpu, tokens),
        )

    def _fastest(self, tokens: int, pairs: Iterable[Pair]) -> Pair:
        by_identity = {messages.identity(pair): pair for pair in pairs}
        distinct = list(by_identity.values())
        if len(distinct) == 1:
            return distinct[0]
        raced = self.answered(BenchLayers(tokens, tuple(distinct), _SCREENED_ROUNDS), LayerTimes)
        us = [statistics.typical_us(samples, raced.routings) for samples in raced.us]
        return distinct[us.index(min(us))]

    def _fastest_plans(self, tokens: int, tuned: Pair) -> dict[PlanKind, KernelPlan]:
        """Of each kind that runs. Raises EngineError where none does."""
        times, failures = sorted_kernel_space.screen_plans(self.problem, tokens, [tuned["up"]], self.ask, self.clean)
        if failures:
            print(f"  M={tokens}: plans left out: {failures}", file=sys.stderr)
        self._complete_triton(tokens, times)
        found: dict[PlanKind, KernelPlan] = {}
        for kind in plan_report.PLAN_KINDS:
            of_kind = [plan for plan in times if plan.is_warp_specialized == (kind == "warp-specialized")]
            if of_kind:
                found[kind] = min(of_kind, key=times.__getitem__)
        if not found:
            raise EngineError(f"none of our plans runs for M={tokens}")
        return found

    def _complete_triton(self, tokens: int, times: dict[KernelPlan, float]) -> None:
        """Time the best up of blocks of 128 rows that is not warp-specialized with every down that is not either."""
        of_blocks = [p for p in times if p.block_m == 128 and not isinstance(p.up, WarpSpecializedUp)]
        if not of_blocks:
            return
        up = min(of_blocks, key=times.__getitem__).up
        for down in sorted_kernel_space.down_configs(self.problem, tokens, 128):
            plan = KernelPlan(up, down)
            if isinstance(down, WarpSpecializedDown) or plan in times or self.clean(plan) is not None:
                continue
            result = self.ask(BenchKernelPlan(tokens, plan, _SAMPLES))
            if isinstance(result, GemmTimes):
                times[plan] = statistics.typical_us(result.us[0], 1)

    def _error(self, tokens: int, runner: Runner) -> float:
        return self.answered(CheckAccuracy(tokens, runner), Accuracy).error


@dataclass(frozen=True, slots=True)
class KnownPairs:
    """By M, what the engine takes as shipped on this GPU, and all other pairs that may be the tuned one."""

    shipped: dict[int, Pair]
    others: list[Pair]

    @property
    def distinct(self) -> list[Pair]:
        return list({messages.identity(pair): pair for pair in (*self.shipped.values(), *self.others)}.values())


def known_pairs(shape: MoEShape, tokens: Sequence[int], as_on: Sequence[Gpu]) -> KnownPairs:
    """Asked of the engine, in a process each, all at once.

    Raises:
        EngineError: the engine does not answer.
    """
    environment = {**os.environ, env.KERNELS: "0"}
    asked = [
        (LookupRequest(shape, tokens, gpu), who)
        for gpu in (None, *as_on)
        for who in (lookup_probe.ALONE, lookup_probe.AS_SERVED)
    ]
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(lambda it: it[1].ask(it[0], environment), asked))
    shipped, *others = (pairs_of(answer) for answer in answers)
    return KnownPairs(shipped, [pair for by_tokens in others for pair in by_tokens.values()])


def run(arguments: argparse.Namespace, command: str) -> None:
    """Race the layers; the last line printed is JSON.

    Raises:
        MoEExtError: there is no GPU or no engine.
    """
    place, began = here(command), time.monotonic()
    engine, layers = place.engine, LAYERS | EP_LAYERS
    print(f"{place.gpu.device_name}, SGLang {engine.version_text}, Triton {engine.triton}, {place.date}: `{command}`")
    as_on = [find_gpu(name) for name in arguments.as_on]
    document: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(2) as asking,
        CompilePool(kernel_source(engine, SGLANG), cache=CompileCache(None), triton_cache=Path(folder)) as pool,
    ):
        make = cast("Callable[[], BenchLike]", LayersSetup(Path(folder)))  # which is asked about a layer
        process = BenchProcess(make, timeout_s=OfLayer.TIME_LIMIT_S)
        try:
            problems = {name: Problem(layers[name], place.gpu, "sglang") for name in arguments.layers}
            known = {
                name: asking.submit(_ask_and_compile, pool, problem, arguments.batch_size, as_on)
                for name, problem in problems.items()
            }
            for name, problem in problems.items():
                if time.monotonic() - began > arguments.seconds:
                    print(f"\n## {name}\n\nnot begun: {arguments.seconds} s are over", flush=True)
                    continue
                pairs = known[name].result()
                for job in jobs_of_pairs(problem, pairs, arguments.batch_size):
                    pool.result(job)  # so that none is compiled where it is timed
                race = LayerRace(problem, cast("Measure", process.measure), clean_with(pool, problem))
                document[name] = race_layer(name, race, pairs, arguments.batch_size, arguments.rounds)
        finally:
            process.close()
    print(f"\n{json.dumps(document)}")


def _ask_and_compile(pool: CompilePool, problem: Problem, tokens: Sequence[int], as_on: Sequence[Gpu]) -> KnownPairs:
    """Have the layer's binaries compiled as soon as the engine has answered: its own first, then those of our plans."""
    pairs = known_pairs(problem.shape, tokens, as_on)
    pool.want(jobs_of_pairs(problem, pairs, tokens))
    pool.want(sorted_kernel_space.screening_jobs(problem, COMPILED_AT, [pair["up"] for pair in pairs.distinct]))
    return pairs


def jobs_of_pairs(problem: Problem, pairs: KnownPairs, tokens: Sequence[int]) -> list[CompileJob]:
    """All binaries of the engine that are raced."""
    jobs = (job for pair in pairs.distinct for m in tokens for job in candidates.pair_jobs(pair, problem, m))
    return list(dict.fromkeys(jobs))


def clean_with(pool: CompilePool, problem: Problem) -> CleanPlan:
    """What the compiler has against a plan."""

    def clean(plan: KernelPlan) -> Failure | None:
        jobs = list_jobs(plan, problem.shape, COMPILED_AT, problem.gpu.sm)
        troubles = (candidates.misfit(job, pool.result(job), problem.gpu) for job in jobs)
        return next((trouble for trouble in troubles if trouble is not None), None)

    return clean


def race_layer(
    name: str, race: LayerRace, pairs: KnownPairs, tokens: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Print the layer's table, row by row; the rows for programs."""
    print(f"\n## {name}\n\n{plan_report.HEADER}", flush=True)
    rows: list[Row] = []
    for m in tokens:
        try:
            rows.append(race.run(m, pairs.shipped[m], pairs.others, rounds))
        except Exception as error:  # noqa: BLE001 - of one batch size; the others are still to be raced
            print(f"| {m} | {type(error).__name__}: {str(error)[:200]} |", flush=True)
            traceback.print_exc()
            continue
        print(plan_report.cells(rows[-1]), flush=True)
    print(f"\n{plan_report.means(rows)}", flush=True)
    return [plan_report.document(row) for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 an error in one line, 2 usage."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=LAYERS | EP_LAYERS, default=list(LAYERS), metavar="NAME")
    parser.add_argument("--batch-size", nargs="+", type=int, default=list(TOKENS), metavar="M")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--as-on", nargs="*", default=[], metavar="GPU")
    parser.add_argument("--seconds", type=float, default=280.0)
    try:
        run(parser.parse_args(given), shlex.join(["python", "-m", "benchmarks.kernel_plans", *given]))
    except MoEExtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
