"""What a run did with the search space: what each rule dropped, what was timed, how good the predicted order was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sglang_moe_ext.core import PROJECTIONS, CompileKey, Projection, TileConfig
from sglang_moe_ext.report.run_data import RegretRow, SpaceCell, SpaceMap
from sglang_moe_ext.tuning import tune_plan
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.search import predict, rocm_space, screening, space
from sglang_moe_ext.tuning.search.screening import Times

CHANGED_BY_ENGINE = "changed by the engine"
_WHY_CHANGED = "the engine launches another configuration of the space in its place"


def map_space(problem: Problem, times: Mapping[int, Times]) -> SpaceMap:
    """The space of that layer with what was timed of it, by M.

    Raises:
        GpuError: the GPU cannot multiply the layer's operands at all.
        ModelError: no candidate suits the layer.
    """
    pruned = tune_plan.prune_space(problem)
    rules = tune_plan.rules_of(problem.gpu)
    everything = _full_space(problem)
    keys = dict.fromkeys(config.compile_key for config in everything)
    fastest = _slowdowns(times)
    cells = tuple(
        SpaceCell(
            key.block_m,
            key.block_n,
            key.block_k,
            key.num_warps,
            key.num_stages,
            _dropped_by(key, problem, rules),
            {projection: fastest[projection, key] for projection in PROJECTIONS if (projection, key) in fastest},
        )
        for key in keys
    )
    timed = {(projection, config) for of_m in times.values() for projection, of in of_m.items() for config in of}
    return SpaceMap(
        cells=cells,
        configurations=len(everything),
        kept=len(pruned.kept),
        dropped={name: count for name, count in pruned.dropped.items() if count},
        why={rule.name: rule.why for rule in rules} | {CHANGED_BY_ENGINE: _WHY_CHANGED},
        timed=len({key for _, key in fastest}),
        with_tma=len({config.compile_key for _, config in timed if config.use_tma}),
    )


def _full_space(problem: Problem) -> tuple[TileConfig, ...]:
    if problem.gpu.target.is_amd:
        return tuple(rocm_space.full_space(problem.shape, problem.gpu))
    return space.full_space()


def _dropped_by(key: CompileKey, problem: Problem, rules: tuple[space.Rule, ...]) -> str | None:
    config = key.with_group(1)
    effective = problem.adapter.effective_config(config, problem.shape.quantization)
    broken = (rule.name for rule in rules if not rule.keeps(effective, problem.shape, problem.gpu))
    return next(broken, None if effective == config else CHANGED_BY_ENGINE)


def _slowdowns(times: Mapping[int, Times]) -> dict[tuple[Projection, CompileKey], float]:
    """Of each binary without TMA, its least time over the best of its GEMM, over all M."""
    found: dict[tuple[Projection, CompileKey], float] = {}
    for m, projection, best in _bests(times):
        for config, us in times[m][projection].items():
            if not config.use_tma:
                place = projection, config.compile_key
                found[place] = min(us / best, found.get(place, us / best))
    return found


def _bests(times: Mapping[int, Times]) -> Iterator[tuple[int, Projection, float]]:
    for m, of_m in times.items():
        for projection, of_gemm in of_m.items():
            if plain := [us for config, us in of_gemm.items() if not config.use_tma]:
                yield m, projection, min(plain)


def rank_regret(problem: Problem, times: Mapping[int, Times]) -> tuple[RegretRow, ...]:
    """The regret of the predicted order among what was timed in both GEMMs, without TMA, by M."""
    found: list[RegretRow] = []
    for m, of_m in sorted(times.items()):
        measured = {
            config: sum(of_m[projection][config] for projection in PROJECTIONS)
            for config in screening.rank_shared(of_m)
            if not config.use_tma
        }
        if not measured:
            continue
        order = sorted(measured, key=lambda config: (predict.estimate_us(config, problem, m), config))
        best, least, curve = min(measured.values()), float("inf"), []
        for config in order:
            least = min(least, measured[config])
            curve.append(least / best - 1)
        found.append(RegretRow(m, tuple(curve)))
    return tuple(found)
