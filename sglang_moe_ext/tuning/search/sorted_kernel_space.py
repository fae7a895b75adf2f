"""Which plans of our own kernels are tried at one M, and which of them wins."""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Literal, cast

from sglang_moe_ext.core import Failure, MoEShape, TileConfig
from sglang_moe_ext.kernel_plans import (
    FIRST_SM,
    LONGEST_K,
    Down,
    DownConfig,
    KernelPlan,
    ShortKDownConfig,
    SortedKernelJob,
    Up,
    UpConfig,
    WarpSpecializedDown,
    WarpSpecializedUp,
    list_jobs,
    why_not_warp_specialized,
    why_unsupported,
)
from sglang_moe_ext.tuning.bench.messages import BenchKernelPlan, GemmTimes, Measure, Pair, Runner
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.search import final_comparison
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice

BLOCKS_M = (64, 128)
_FEWEST_ROWS = 32


def why_not(shape: MoEShape, tokens: int, sm: int = FIRST_SM) -> str | None:
    """Why no plan behind a sort is tried there, None where some are."""
    if sm < FIRST_SM:
        return f"they are for sm_{FIRST_SM} and newer, this GPU is sm_{sm}"
    if why := why_unsupported(shape):
        return why
    # H200, 2026-11-21: below, ours lost at every M of four layers (docs/benchmarks/kernels.md).
    if tokens * shape.top_k < _FEWEST_ROWS * shape.experts * shape.ep:
        return f"with fewer than {_FEWEST_ROWS} rows an expert, tiles of {BLOCKS_M[0]} rows are padding"
    return None


_Kind = Literal["16 bits", "block", "channel"]
_UPS: dict[_Kind, tuple[tuple[int, int, int, int, int, int, bool, bool], ...]] = {
    # block_m, block_n, block_k, warps, stages, programs an SM (0: not persistent), is_fused, half stores
    "16 bits": (
        (128, 128, 64, 8, 4, 1, True, False),
        (128, 128, 64, 8, 3, 1, True, False),
        (128, 256, 64, 8, 4, 1, False, True),
        (64, 128, 64, 8, 4, 1, True, False),
        (64, 128, 64, 4, 4, 1, True, False),
        (64, 128, 64, 4, 2, 2, True, False),
    ),
    "block": (
        (64, 128, 128, 8, 3, 1, True, False),
        (64, 128, 128, 8, 2, 0, True, False),
        (64, 128, 128, 4, 3, 0, False, False),
        (64, 128, 128, 4, 4, 2, False, False),
        (128, 128, 128, 8, 3, 1, False, False),
    ),
    "channel": (),  # our up kernel knows no scales of channels
}
_UP_GROUPS = (8, 32)

_DOWNS: dict[_Kind, tuple[tuple[int, int, int, int, int, int, bool], ...]] = {
    # block_m, block_n, block_k, warps, stages, programs an SM (0: not persistent), half stores; the best guess first
    "16 bits": (
        (128, 256, 64, 8, 4, 1, True),
        (128, 256, 64, 8, 3, 1, False),
        (64, 256, 64, 8, 4, 1, True),
        (64, 256, 64, 4, 3, 1, False),
        (64, 128, 64, 4, 4, 2, False),
    ),
    "block": (
        (64, 128, 128, 4, 4, 2, False),
        (64, 128, 128, 4, 3, 0, False),
        (64, 128, 128, 8, 3, 2, False),
        (128, 128, 128, 8, 3, 2, False),
    ),
    "channel": (
        (128, 256, 128, 8, 4, 1, True),
        (128, 256, 128, 8, 3, 1, False),
        (64, 256, 128, 8, 4, 1, True),
        (64, 256, 128, 4, 3, 1, False),
        (64, 128, 128, 4, 4, 2, False),
    ),
}
_DOWN_GROUPS = (8, 1)
# block_m, block_n, block_k, tiles a program, warps, stages
_SHORT_DOWNS_BLOCK_FP8 = ((64, 64, 128, 28, 4, 3), (64, 64, 128, 112, 4, 3))

_FEWEST_TOKENS_IN_GLUON = 512
"""Below, tiles of 128 rows are mostly padding."""
# Each won somewhere on an H100 or an H200, 2026-11-26 (docs/benchmarks/warp_specialized.md); the best guess first.
_UPS_IN_GLUON = (WarpSpecializedUp(2), WarpSpecializedUp(8), WarpSpecializedUp(1, persistent=False))
_DOWNS_IN_GLUON: dict[_Kind, tuple[WarpSpecializedDown, ...]] = {
    "16 bits": (WarpSpecializedDown("wide", 4), WarpSpecializedDown("wide", 8)),
    "block": (
        WarpSpecializedDown("pair", 8, 3),
        WarpSpecializedDown("pair", 4, 3),
        WarpSpecializedDown("wide", 4),
        WarpSpecializedDown("wide", 8),
    ),
    "channel": (WarpSpecializedDown("wide", 8), WarpSpecializedDown("wide", 4)),
}


def _why_not_in_gluon(problem: Problem, tokens: int) -> str | None:
    """Why no warp-specialized kernel is tried there."""
    if tokens < _FEWEST_TOKENS_IN_GLUON:
        return f"below M={_FEWEST_TOKENS_IN_GLUON} their tiles are padding"
    return why_not_warp_specialized(problem.gpu.sm, problem.triton)


def up_configs(problem: Problem, tokens: int, engines: Iterable[TileConfig]) -> list[Up]:
    """The engine's up GEMM as it runs, where its blocks of the sort suit our down GEMM, and ours."""
    plain = dict.fromkeys(replace(config, use_tma=False) for config in engines if config.block_m in BLOCKS_M)
    shape, columns = problem.shape, problem.shape.intermediate_size
    return [
        *plain,
        *(() if _why_not_in_gluon(problem, tokens) else _UPS_IN_GLUON),
        *(
            UpConfig(m, n, k, group, warps, stages, processes > 0, max(processes, 1), is_fused, half)
            for (m, n, k, warps, stages, processes, is_fused, half), group in itertools.product(
                _UPS[_kind(shape)], _UP_GROUPS
            )
            if (columns if is_fused else 2 * columns) % n == 0 and shape.hidden_size % k == 0
        ),
    ]


def down_configs(problem: Problem, tokens: int, block_m: int) -> list[Down]:
    """Those whose rows lie within one block of the sort, the best guess first."""
    shape = problem.shape
    found: list[Down] = [
        DownConfig(m, n, k, group, warps, stages, processes > 0, max(processes, 1), half)
        for (m, n, k, warps, stages, processes, half), group in itertools.product(_DOWNS[_kind(shape)], _DOWN_GROUPS)
        if block_m % m == 0
    ]
    found.sort(key=lambda config: -config.block_m)  # stable: whole blocks first
    if shape.quantization.is_block_wise and shape.intermediate_size <= LONGEST_K:
        found += [ShortKDownConfig(*numbers) for numbers in _SHORT_DOWNS_BLOCK_FP8 if block_m % numbers[0] == 0]
    if _why_not_in_gluon(problem, tokens):
        return found
    return [*(config for config in _DOWNS_IN_GLUON[_kind(shape)] if config.block_m == block_m), *found]


def _kind(shape: MoEShape) -> _Kind:
    if shape.quantization.scheme is None:
        return "16 bits"
    return "block" if shape.quantization.is_block_wise else "channel"


log = logging.getLogger(__name__)

CleanPlan = Callable[[KernelPlan], Failure | None]
"""What is known against a plan before it runs; waits for its binaries. A test says None."""
_SAMPLES = 4
_FINALISTS = 3


def screening_jobs(problem: Problem, tokens: int, engines_ups: Iterable[TileConfig] = ()) -> list[SortedKernelJob]:
    """The binaries of all plans that a screening may time at that M, without the engine's ups where none is given."""
    shape, sm = problem.shape, problem.gpu.sm
    if why_not(shape, tokens, sm):
        return []
    downs = {block_m: down_configs(problem, tokens, block_m) for block_m in BLOCKS_M}
    ups = up_configs(problem, tokens, engines_ups)
    plans = [KernelPlan(up, down) for up in ups for down in downs[up.block_m]]
    return list(dict.fromkeys(job for plan in plans for job in list_jobs(plan, shape, tokens, sm)))


def compare_plans(
    problem: Problem,
    tokens: int,
    chosen: Pair,
    engines_ups: Iterable[TileConfig],
    measure: Measure,
    clean: CleanPlan,
    *,
    rounds: int,
) -> MeasuredChoice[Runner] | None:
    """The kernel plan that beats the chosen pair beyond doubt, or the pair; None where no plan can be tried.

    `engines_ups`: the engine's up configurations that our down GEMMs may run behind.
    """
    if why := why_not(problem.shape, tokens, problem.gpu.sm):
        log.info("M=%d: our own kernels are not tried: %s", tokens, why)
        return None
    if why := _why_not_in_gluon(problem, tokens):
        log.info("M=%d: %s", tokens, why)
    times, failures = screen_plans(problem, tokens, engines_ups, measure, clean)
    best: list[Runner] = [*sorted(times, key=times.__getitem__)[:_FINALISTS]]
    tried, incumbent = len(times) + sum(failures.values()), cast("Runner", chosen)
    return final_comparison.confirm(
        problem.shape, tokens, best, incumbent, measure, rounds=rounds, tried=tried, failures=failures
    )


def screen_plans(
    problem: Problem, tokens: int, engines_ups: Iterable[TileConfig], measure: Measure, clean: CleanPlan
) -> tuple[dict[KernelPlan, float], Mapping[str, int]]:
    """Microseconds of the layer: each up with the first down of its blocks, then the best of each with every down."""
    times: dict[KernelPlan, float] = {}
    failures: dict[str, int] = {}

    def runs(plan: KernelPlan) -> bool:
        result = clean(plan) or measure(BenchKernelPlan(tokens, plan, _SAMPLES))
        if isinstance(result, GemmTimes):
            times[plan] = statistics.median(result.us[0])
        elif isinstance(result, Failure):
            failures[result.kind] = failures.get(result.kind, 0) + 1
            log.info("M=%d: %s cannot run: %s", tokens, plan, result.message)
        else:
            raise TypeError(f"BenchKernelPlan returned {result}")
        return plan in times

    downs = {block_m: down_configs(problem, tokens, block_m) for block_m in BLOCKS_M}
    for up in up_configs(problem, tokens, engines_ups):
        of_block = downs[up.block_m]
        # Until one runs, it may be the down tile that is too large for this GPU.
        while not runs(KernelPlan(up, of_block[0])) and len(of_block) > 1 and not _any_of(times, up.block_m):
            of_block.pop(0)
    for block_m, of_block in downs.items():
        if timed := _any_of(times, block_m):
            best = min(timed, key=times.__getitem__)
            for down in of_block[1:]:
                runs(KernelPlan(best.up, down))
    return times, failures


def _any_of(times: Iterable[KernelPlan], block_m: int) -> list[KernelPlan]:
    return [plan for plan in times if plan.block_m == block_m]
