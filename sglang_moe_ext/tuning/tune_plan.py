"""What a run will do, before it does it: candidates, binaries, the floor, what could be won. Needs no GPU."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_moe_ext.core import CompileJob, Gpu, GpuError, ModelError, MoEShape, TileConfig
from sglang_moe_ext.engines.lookup_probe import LookupResult
from sglang_moe_ext.gpu.roofline import pair_floor_us
from sglang_moe_ext.tuning.bench.messages import Pair
from sglang_moe_ext.tuning.compile.pool import default_workers
from sglang_moe_ext.tuning.incumbents import pairs_of
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.request import TuneRequest
from sglang_moe_ext.tuning.search import candidates, predict, rocm_space, space
from sglang_moe_ext.tuning.search.predict import estimate_us
from sglang_moe_ext.tuning.search.prediction_error import margin

DEFAULT_TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 8192, 16384)
"""Upstream's 18 batch sizes, and the two that a chunked prefill asks for: the engine takes the nearest, however far."""

# Machine of 16 cores and one H200, SGLang 0.5.15, Triton 3.6.0, 2026-11-21: an import of the engine; one binary on one
# core, one screened binary, one final comparison with its checks.
_START_S, _COMPILE_S, _SCREEN_S, _COMPARISON_S = 14.0, 0.16, 0.004, 0.3


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One M: the floor, and the predicted times of the best candidate and of what the engine takes today.

    `incumbent` is today's pair, None where no engine was asked. `keeps_today`: a run that
    predicts writes today's pair, since the best is not faster by more than the model's error.
    """

    tokens: int
    floor_us: float
    best: TileConfig
    best_us: float
    incumbent_us: float | None
    incumbent: Pair | None = None
    keeps_today: bool = False

    @property
    def gain(self) -> float | None:
        """Predicted, of the best candidate over today's pair."""
        return None if self.incumbent_us is None else self.incumbent_us / self.best_us


@dataclass(frozen=True, slots=True)
class TunePlan:
    """What a run will do. `measures`: on the GPU, rather than by the model alone.

    `today`: the engine's answer of what it runs now, None where it was not asked.
    """

    shape: MoEShape
    gpu: Gpu
    measures: bool
    pruned: space.PrunedSpace
    rows: tuple[PlanRow, ...]
    binaries: int
    estimated_s: float
    today: LookupResult | None = None


def rules_of(gpu: Gpu) -> tuple[space.Rule, ...]:
    """The rules that candidates for that GPU are held against."""
    return rocm_space.RULES if gpu.target.is_amd else space.RULES


def prune_space(problem: Problem) -> space.PrunedSpace:
    """The candidates that no rule drops.

    Raises:
        GpuError: the GPU cannot multiply the layer's operands at all.
        ModelError: the layer is so small, or its scales so fine, that no candidate suits it.
    """
    shape, gpu = problem.shape, problem.gpu
    if shape.quantization.scheme == "fp8_w8a8" and gpu.fp8_tflops is None:
        expected = "gfx942 or newer" if gpu.target.is_amd else "sm_89 or newer"
        instead = "" if gpu.target.is_amd else "; engines run such weights through Marlin there, which reads no table"
        raise GpuError(f"{gpu.device_name} ({gpu.target}) has no fp8 matrix units: expected {expected}{instead}")
    everything = rocm_space.full_space(shape, gpu) if gpu.target.is_amd else space.full_space()
    space_of_engine = dict.fromkeys(
        problem.adapter.effective_config(config, shape.quantization) for config in everything
    )
    found = space.prune(space_of_engine, shape, gpu, rules_of(gpu))
    if not found.kept:
        dropped = ", ".join(f"{name} {count}" for name, count in found.dropped.items() if count)
        raise ModelError(f"no candidate is left for {shape} on {gpu.device_name}: the rules dropped all ({dropped})")
    return found


def make_plan(request: TuneRequest, today: LookupResult | None) -> TunePlan:
    """The plan of a run.

    Raises:
        MoEExtError: as `pruned`.
    """
    problem = request.problem
    found = prune_space(problem)
    rows = tuple(_row(found.kept, problem, m, today) for m in request.tokens)
    screens = 0
    jobs: set[CompileJob] = set()
    for m in request.tokens:
        if request.measuring is None:
            front = predict.best_of_each_key(found.kept, problem, m)[: predict.FRONT]
            jobs.update(job for config in front for job in predict.list_jobs(config, problem, m).values())
        else:
            of_m = candidates.screening_jobs(
                candidates.list_for_effort(
                    found.kept, problem, m, effort=request.measuring.effort, with_tma=request.measuring.with_tma
                ),
                problem,
                m,
            )
            screens += len(of_m)
            jobs.update(of_m)
    compiling_s = len(jobs) * _COMPILE_S / default_workers()
    if request.measuring is None:
        seconds = 2 * _START_S + compiling_s
    else:
        gpus = max(1, len(request.measuring.gpus))
        seconds = _START_S + max(compiling_s, screens * _SCREEN_S / gpus) + len(rows) * _COMPARISON_S / gpus
    return TunePlan(problem.shape, problem.gpu, request.measuring is not None, found, rows, len(jobs), seconds, today)


def _row(kept: tuple[TileConfig, ...], problem: Problem, tokens: int, today: LookupResult | None) -> PlanRow:
    best = predict.by_estimate(kept, problem, tokens)[0]
    floor_us, best_us = pair_floor_us(problem.shape, problem.gpu, tokens), estimate_us(best, problem, tokens)
    if today is None:
        return PlanRow(tokens, floor_us, best, best_us, None)
    incumbent = pairs_of(today)[tokens]
    incumbent_us = estimate_us(incumbent, problem, tokens)
    keeps_today = incumbent_us / best_us <= margin(tokens)
    return PlanRow(tokens, floor_us, best, best_us, incumbent_us, incumbent, keeps_today)
