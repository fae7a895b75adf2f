"""A table without a GPU: rank candidates by the wave model, compile what could win, keep what fits and is clean."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from sglang_moe_ext.core import (
    PROJECTIONS,
    CompileJob,
    CompileKey,
    EngineError,
    Failure,
    Gpu,
    MoEExtError,
    Projection,
    Resources,
    TileConfig,
)
from sglang_moe_ext.tuning.bench.messages import Pair
from sglang_moe_ext.tuning.compile.kernel_source import Compiled
from sglang_moe_ext.tuning.compile.processes import UNABLE
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.search import cost_model
from sglang_moe_ext.tuning.search.prediction_error import margin

CompileAll = Callable[[Sequence[CompileJob]], Compiled]
FRONT = 4
"""How many of the best-ranked candidates of each M are compiled in a round."""
REFUSED = MoEExtError.__name__
"""Kind of a failure in which the kernel's own launcher says that it cannot do a layer, as ours does of int4."""


@dataclass(frozen=True, slots=True)
class PredictedConfig:
    """The entry for one M: predicted microseconds of both GEMMs, and what the compiled binaries need.

    `gain`: predicted, of the best candidate over what the engine runs today, None where that is not known. Where it is
    not more than the model's error, `keeps_today`: `config` and `down` are today's, and `us` is their time.
    """

    config: TileConfig
    us: float
    resources: dict[Projection, Resources]
    down: TileConfig | None = None
    gain: float | None = None
    keeps_today: bool = False

    @property
    def pair(self) -> Pair:
        return {"up": self.config, "down": self.down or self.config}


def list_jobs(config: TileConfig, problem: Problem, tokens: int) -> dict[Projection, CompileJob]:
    """The binaries that a configuration needs at that many tokens."""
    representative, target = problem.representative_tokens(tokens), problem.gpu.target
    return {
        projection: CompileJob(problem.shape, projection, representative, config.compile_key, target)
        for projection in PROJECTIONS
    }


def clean_resources(
    jobs: dict[Projection, CompileJob], compiled: Compiled, gpu: Gpu
) -> dict[Projection, Resources] | None:
    """What the binaries need, or None where one failed, does not fit the GPU, or spills."""
    found: dict[Projection, Resources] = {}
    for projection, job in jobs.items():
        result = compiled[job]
        if isinstance(result, Failure) or result.smem_bytes > gpu.smem_per_block or result.spill_bytes:
            return None
        found[projection] = result
    return found


def predict_table(
    candidates: Sequence[TileConfig],
    problem: Problem,
    tokens: Sequence[int],
    compile_all: CompileAll,
    today: Mapping[int, Pair] | None = None,
) -> dict[int, PredictedConfig]:
    """The best candidate for each M, compiled. Only what is ranked ahead of a compiled, clean candidate is compiled.

    `today`: what the engine runs now. It stays where the best candidate is not predicted faster by more than the
    model's own error, and where it fits the GPU.

    Raises:
        EngineError: no candidate compiles for some M.
    """
    shape, gpu = problem.shape, problem.gpu
    compiled: Compiled = {}
    ranked = {m: best_of_each_key(tuple(candidates), problem, m) for m in tokens}
    chosen: dict[int, PredictedConfig] = {}
    while len(chosen) < len(ranked):
        fronts = {m: ranked[m][:FRONT] for m in ranked if m not in chosen}
        if not all(fronts.values()):
            empty = next(m for m, front in fronts.items() if not front)
            why = _why_not_clean(list(compiled.values()), gpu)
            raise EngineError(f"no candidate is clean for M={empty} on {gpu.device_name}: {why}")
        compiled |= compile_all(
            [job for m, front in fronts.items() for config in front for job in list_jobs(config, problem, m).values()]
        )
        _refuse_if_hopeless(compiled)
        for m, front in fronts.items():
            clean = [
                PredictedConfig(config, cost_model.pair_us(config, shape, gpu, m, resources), resources)
                for config in front
                if (resources := clean_resources(list_jobs(config, problem, m), compiled, gpu)) is not None
            ]
            if clean:
                chosen[m] = min(clean, key=lambda predicted: predicted.us)
            else:
                ranked[m] = ranked[m][FRONT:]
    return chosen if today is None else _keep_today(chosen, problem, today, compile_all)


def _why_not_clean(results: Sequence[Resources | Failure], gpu: Gpu) -> str:
    """Of binaries none of which can be taken, the figure of the one that comes nearest, or what the compiler said."""
    needs = [result for result in results if isinstance(result, Resources)]
    failures = sorted({result.message for result in results if isinstance(result, Failure)})
    if failures or not needs:
        return failures[0] if failures else "none was compiled"
    smallest = min(need.smem_bytes for need in needs)
    if smallest > gpu.smem_per_block:
        return f"the smallest needs {smallest} B of shared memory, and a block has {gpu.smem_per_block} B"
    return f"all spill registers, the least {min(need.spill_bytes for need in needs)} B a thread"


def gain_over(today: TileConfig | Pair, best: TileConfig | Pair, problem: Problem, tokens: int) -> float:
    """How many times faster `best` is than `today`, as predicted."""
    return estimate_us(today, problem, tokens) / estimate_us(best, problem, tokens)


def estimate_us(config: TileConfig | Pair, problem: Problem, tokens: int) -> float:
    """Microseconds of both GEMMs, as far as can be told before compiling."""
    shape, gpu = problem.shape, problem.gpu
    pair: Pair = {"up": config, "down": config} if isinstance(config, TileConfig) else config
    return sum(
        cost_model.gemm(config, shape, gpu, tokens, projection, cost_model.estimate(config, shape, gpu)).us
        for projection, config in pair.items()
    )


def _keep_today(
    chosen: Mapping[int, PredictedConfig], problem: Problem, today: Mapping[int, Pair], compile_all: CompileAll
) -> dict[int, PredictedConfig]:
    """The same, with today's pair where the choice is not faster by more than the model's error."""
    gains = {m: gain_over(today[m], choice.config, problem, m) for m, choice in chosen.items()}
    within = {m: _pair_jobs(today[m], problem, m) for m, gain in gains.items() if gain <= margin(m)}
    compiled = compile_all(list(dict.fromkeys(job for jobs in within.values() for job in jobs.values())))
    kept: dict[int, PredictedConfig] = {}
    for m, choice in chosen.items():
        resources = _fitting_resources(within[m], compiled, problem.gpu) if m in within else None
        if resources is None:
            kept[m] = replace(choice, gain=gains[m])
        else:
            us = estimate_us(today[m], problem, m)
            kept[m] = PredictedConfig(today[m]["up"], us, resources, today[m]["down"], gains[m], keeps_today=True)
    return kept


def _pair_jobs(pair: Pair, problem: Problem, tokens: int) -> dict[Projection, CompileJob]:
    return {projection: list_jobs(config, problem, tokens)[projection] for projection, config in pair.items()}


def _fitting_resources(
    jobs: dict[Projection, CompileJob], compiled: Compiled, gpu: Gpu
) -> dict[Projection, Resources] | None:
    """What the binaries need, None where the engine cannot run one of them; it runs one that spills."""
    found = {projection: compiled[job] for projection, job in jobs.items()}
    fitting = {name: needs for name, needs in found.items() if isinstance(needs, Resources)}
    if fitting.keys() != found.keys() or any(needs.smem_bytes > gpu.smem_per_block for needs in fitting.values()):
        return None
    return fitting


def _refuse_if_hopeless(compiled: Compiled) -> None:
    """Raises EngineError where no other candidate would fare better.

    The kernel itself, not the compiler, refused every binary: it cannot do the layer. Or nothing can be compiled.
    """
    unable = next((it for it in compiled.values() if isinstance(it, Failure) and it.kind == UNABLE), None)
    if unable is not None:
        raise EngineError(f"nothing can be compiled: {unable.message}")
    refusals = [
        result.message for result in compiled.values() if isinstance(result, Failure) and result.kind == REFUSED
    ]
    if refusals and len(refusals) == len(compiled):
        raise EngineError(refusals[0])


@functools.lru_cache(maxsize=64)
def by_estimate(
    candidates: tuple[TileConfig, ...], problem: Problem, tokens: int, projections: tuple[Projection, ...] = PROJECTIONS
) -> list[TileConfig]:
    """Fastest in these GEMMs first, as far as can be told before compiling; of equals the one with the smaller tile."""
    clocks = [_estimates(candidates, problem, tokens)[projection] for projection in projections]
    return [config for _, config in sorted(zip(map(sum, zip(*clocks, strict=True)), candidates, strict=True))]


@functools.lru_cache(maxsize=64)
def _estimates(
    candidates: tuple[TileConfig, ...], problem: Problem, tokens: int
) -> dict[Projection, tuple[float, ...]]:
    """Of each GEMM, predicted microseconds of each candidate."""
    shape, gpu = problem.shape, problem.gpu
    needs = [cost_model.estimate(config, shape, gpu) for config in candidates]
    return {
        projection: tuple(
            cost_model.gemm(config, shape, gpu, tokens, projection, resources).us
            for config, resources in zip(candidates, needs, strict=True)
        )
        for projection in PROJECTIONS
    }


def best_of_each_key(candidates: tuple[TileConfig, ...], problem: Problem, tokens: int) -> list[TileConfig]:
    """Of the candidates that differ in GROUP_SIZE_M alone, the best; fastest first."""
    best: dict[CompileKey, TileConfig] = {}
    for config in by_estimate(candidates, problem, tokens):
        best.setdefault(config.compile_key, config)
    return list(best.values())
