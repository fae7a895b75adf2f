"""Which configurations of each GEMM are timed at one M, best guess first, and the binaries that they need."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace

from sglang_moe_ext.core import PROJECTIONS, CompileJob, CompileKey, Failure, Gpu, Projection, Resources, TileConfig
from sglang_moe_ext.tuning.bench.messages import Pair
from sglang_moe_ext.tuning.compile.kernel_source import Job
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.search import predict
from sglang_moe_ext.tuning.search.screening import EFFORTS, EffortName, groups_by_key

Candidates = dict[Projection, list[TileConfig]]


def list_for_effort(
    kept: tuple[TileConfig, ...],
    problem: Problem,
    tokens: int,
    *,
    effort: EffortName,
    with_tma: Sequence[Projection],
) -> Candidates:
    """What a run of that effort times at that M."""
    keys = EFFORTS[effort].keys
    if not problem.adapter.HAS_DOWN_TABLES:
        return list_shared_candidates(kept, problem, tokens, keys=keys)
    return list_candidates(kept, problem, tokens, keys=keys, with_tma=with_tma)


def list_shared_candidates(
    kept: tuple[TileConfig, ...], problem: Problem, tokens: int, *, keys: int | None
) -> Candidates:
    """The same candidates for each GEMM, where one configuration serves both: the first `keys` binaries, best first."""
    groups = groups_by_key(predict.by_estimate(kept, problem, tokens))
    best = [key.with_group(group) for key in itertools.islice(groups, keys) for group in groups[key]]
    return dict.fromkeys(PROJECTIONS, best)


def list_candidates(
    kept: tuple[TileConfig, ...],
    problem: Problem,
    tokens: int,
    *,
    keys: int | None,
    with_tma: Collection[Projection],
) -> Candidates:
    """The candidates of each GEMM, grouped by binary: the first `keys` binaries by the wave model, None for all.

    Half of them are the best for both GEMMs together, so that each GEMM has candidates of the other's BLOCK_SIZE_M, and
    the very best of those comes first in both: a search that ends early has a pair.
    `with_tma`: the GEMMs that are timed with TMA too.
    """
    for_both = groups_by_key(predict.by_estimate(kept, problem, tokens))
    shared = list(for_both)[: None if keys is None else keys // 2]
    found: Candidates = {}
    for projection in PROJECTIONS:
        groups = groups_by_key(predict.by_estimate(kept, problem, tokens, (projection,)))
        wanted = set(itertools.islice(dict.fromkeys((*shared, *groups)), keys))
        found[projection] = [
            variant.with_group(group)
            for key, of_key in sorted(groups.items(), key=lambda item: item[0] != shared[0])
            if key in wanted
            for variant in (_with_and_without_tma(key) if projection in with_tma else (key,))
            for group in of_key
        ]
    return found


def _with_and_without_tma(key: CompileKey) -> tuple[CompileKey, CompileKey]:
    """The same tile without TMA and with it."""
    return key, replace(key, use_tma=True)


def screening_job(problem: Problem, tokens: int, projection: Projection, key: CompileKey) -> CompileJob:
    """The binary that a screening launches: for any GROUP_SIZE_M."""
    return CompileJob(problem.shape, projection, problem.representative_tokens(tokens), key, problem.gpu.target)


def screening_jobs(candidates: Candidates, problem: Problem, tokens: int) -> list[CompileJob]:
    """The binaries of all candidates at one M, each once."""
    return list(
        dict.fromkeys(
            screening_job(problem, tokens, projection, config.compile_key)
            for projection, configs in candidates.items()
            for config in configs
        )
    )


def misfit(job: Job, needs: Resources | Failure, gpu: Gpu) -> Failure | None:
    """What stands against launching that binary on that GPU, None where nothing does."""
    if isinstance(needs, Failure):
        return needs
    if needs.smem_bytes > gpu.smem_per_block:
        why = f"{needs.smem_bytes} B of shared memory for the {job.projection} GEMM"
        return Failure("OutOfResources", f"{why}, and a block has {gpu.smem_per_block} B")
    return None


def pair_jobs(pair: Pair, problem: Problem, tokens: int) -> list[CompileJob]:
    """The binaries that the engine launches for a pair: groups are constants, and TMA decides the up GEMM's order."""
    representative = problem.representative_tokens(tokens)
    return [
        CompileJob(
            problem.shape,
            projection,
            representative,
            config.compile_key,
            problem.gpu.target,
            config.group_m,
            sorted_rows=projection == "up" and pair["down"].use_tma,
        )
        for projection, config in pair.items()
    ]
