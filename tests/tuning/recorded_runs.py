"""Runs of real layers without a GPU: from complete recordings of an H200 in tests/data/journals, or from a formula."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sglang_moe_ext.core import Failure, MoEShape, Projection, Quantization, Resources, TileConfig
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.tuning import tune_plan
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchGemm,
    BenchLayers,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
    GemmTimes,
    LayerTimes,
    Measure,
    Pair,
)
from sglang_moe_ext.tuning.bench.routing import MIXED
from sglang_moe_ext.tuning.compile.kernel_source import Job
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.request import MeasureOptions, TuneRequest
from sglang_moe_ext.tuning.run import journal, journal_reader, search_loop
from sglang_moe_ext.tuning.run.executor import Executor
from sglang_moe_ext.tuning.run.journal import Journal
from sglang_moe_ext.tuning.run.journal_reader import Recording
from sglang_moe_ext.tuning.run.search_loop import SearchTask
from sglang_moe_ext.tuning.search import candidates
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice

JOURNALS = Path(__file__).resolve().parents[1] / "data" / "journals"
LAYERS = {
    "glm_4_7_flash_bf16": MoEShape(65, 1536, 2048, 5, fused_shared=1),
    "qwen3_30b_a3b_fp8_block": MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", (128, 128))),
}
GPU = find_gpu("H200")
FITS = Resources(smem_bytes=65536, registers=128, spill_bytes=0)
MEASURING = MeasureOptions(effort="full", with_tma=("down",), budget_s=None, routing=MIXED, gpus=("0",))


def path_of(layer: str) -> Path:
    return JOURNALS / f"{layer}.jsonl.gz"


@functools.cache
def recorded(layer: str) -> Recording:
    return journal_reader.read(path_of(layer))


def request_of(
    layer: str, tokens: Sequence[int] = tune_plan.DEFAULT_TOKENS, measuring: MeasureOptions = MEASURING
) -> TuneRequest:
    """As the command would make it."""
    return TuneRequest(
        model=layer,
        architecture="",
        problem=Problem(LAYERS[layer], GPU, "sglang"),
        vllm_shape=None,
        gpu_is_here=True,
        tokens=tuple(tokens),
        measuring=measuring,
        install="none",
        output_dir=None,
        seed=0,
        command="",
    )


def tasks_of(
    layer: str, tokens: Sequence[int] = tune_plan.DEFAULT_TOKENS, measuring: MeasureOptions = MEASURING
) -> list[SearchTask]:
    request = request_of(layer, tokens, measuring)
    kept = tune_plan.prune_space(request.problem).kept
    return search_loop.largest_first(
        {
            m: candidates.list_for_effort(
                kept, request.problem, m, effort=measuring.effort, with_tma=measuring.with_tma
            )
            for m in tokens
        }
    )


@functools.cache
def incumbents_of(layer: str) -> dict[int, Pair]:
    """The pair that begins and ends the race of all finalists, by M."""
    races = (request for request, _ in recorded(layer).results.values() if isinstance(request, BenchLayers))
    return {race.tokens: race.pairs[0] for race in races if len(race.pairs) > 1 and race.pairs[0] == race.pairs[-1]}


@functools.cache
def replayed(layer: str) -> Measure:
    return journal.replay([path_of(layer)])


TODAY: Pair = {"up": TileConfig(64, 64, 32, 8, 4, 3), "down": TileConfig(64, 64, 32, 8, 4, 3)}
"""What the engine runs where no table says otherwise."""


def formula_us(tokens: int, projection: Projection, config: TileConfig) -> float:
    """Of one GEMM; each configuration differs from the next, always in the same way."""
    slowness = 2.0 if config == TODAY[projection] else random.Random(f"{tokens} {projection} {config}").uniform(1, 2)
    return (10 + tokens / 10) * slowness


def formula(request: BenchRequest) -> BenchResult:
    """A GPU whose results follow from the request alone; one binary in ten fails."""
    match request:
        case BenchGemm(tokens, projection, key, groups, samples):
            if random.Random(str(key)).random() < 0.1:
                return Failure("OutOfResources", "shared memory")
            return GemmTimes(tuple((formula_us(tokens, projection, key.with_group(g)),) * samples for g in groups))
        case BenchLayers(tokens, pairs, rounds):
            sums = [sum(formula_us(tokens, of, config) for of, config in pair.items()) for pair in pairs]
            return LayerTimes(tuple((us,) * rounds for us in sums), routings=1)
        case CheckAccuracy():
            return Accuracy(1e-3)


@dataclass
class ReplayingStation:
    """A GPU that remembers what it was asked; every binary fits where `needs` does not say otherwise."""

    results: Measure
    name: str = "GPU 0"
    seconds: float = 0.0
    needs: Callable[[Job], Resources | Failure] = lambda job: FITS
    asked: list[BenchRequest] = field(default_factory=list)
    wanted: set[Job] = field(default_factory=set)

    def get_ready(self) -> None:
        """At once."""

    def want(self, jobs: Iterable[Job]) -> None:
        self.wanted.update(jobs)

    def binary(self, job: Job) -> Resources | Failure:
        return self.needs(job)

    def measure(self, request: BenchRequest) -> BenchResult:
        time.sleep(self.seconds)
        self.asked.append(request)
        return self.results(request)

    def close(self) -> None:
        pass


def unseen(stage: str, done: int, of: int) -> None:
    pass


def measured(
    layer: str,
    run: Journal,
    executors: Sequence[Executor],
    tokens: Sequence[int] = tune_plan.DEFAULT_TOKENS,
    measuring: MeasureOptions = MEASURING,
    today: dict[int, Pair] | None = None,
) -> dict[int, MeasuredChoice]:
    """What a run over these executors chooses, by M; in place of the recorded incumbents those of `today`."""
    return search_loop.measure_all(
        request_of(layer, tokens, measuring),
        measuring,
        tasks_of(layer, tokens, measuring),
        lambda: incumbents_of(layer) if today is None else today,
        executors,
        run,
        unseen,
    ).pairs
