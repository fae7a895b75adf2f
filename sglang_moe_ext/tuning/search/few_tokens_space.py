"""Whether the two launches for few tokens beat the pair chosen for the engine's kernels, at one M, in CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import cast

from sglang_moe_ext import few_tokens_config
from sglang_moe_ext.core import Failure
from sglang_moe_ext.few_tokens_config import FIRST_SM, FewTokensConfig
from sglang_moe_ext.kernel_plans import SortedKernelJob, few_tokens_problem, list_jobs, why_unsupported
from sglang_moe_ext.tuning.bench.messages import Measure, Pair, Runner
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.search import final_comparison
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice

log = logging.getLogger(__name__)


def contenders(problem: Problem, tokens: int) -> tuple[FewTokensConfig, ...]:
    """What is raced there, none where nothing of it ever won.

    With float8 weights and bfloat16 activations, in the range of bfloat16: whatever a model computes, no value that
    the engine's kernels carry becomes infinite.
    """
    shape = problem.shape
    if problem.gpu.sm < FIRST_SM or why_unsupported(shape) or not problem.adapter.takes_few_tokens(shape):
        return ()
    found = few_tokens_config.contenders(few_tokens_problem(shape, tokens))
    is_narrower = shape.dtype == "bfloat16" and shape.quantization.scheme == "fp8_w8a8"
    return tuple(replace(config, wide_range=True) for config in found) if is_narrower else found


def jobs(problem: Problem, tokens: int) -> list[SortedKernelJob]:
    """The binaries of all contenders at that M."""
    plans = contenders(problem, tokens)
    return [job for plan in plans for job in list_jobs(plan, problem.shape, tokens, problem.gpu.sm)]


def compare_plans(
    problem: Problem,
    tokens: int,
    chosen: Pair,
    measure: Measure,
    clean: Callable[[FewTokensConfig], Failure | None],
    *,
    rounds: int,
) -> MeasuredChoice[Runner] | None:
    """The plan that beats the chosen pair beyond doubt, or the pair: whole layers, in CUDA graphs."""
    failures: dict[str, int] = {}
    finalists: list[Runner] = []
    for plan in contenders(problem, tokens):
        if failure := clean(plan):
            failures[failure.kind] = failures.get(failure.kind, 0) + 1
            log.info("M=%d: %s cannot run: %s", tokens, plan, failure.message)
        else:
            finalists.append(plan)
    tried, incumbent = len(finalists) + sum(failures.values()), cast("Runner", chosen)
    return final_comparison.confirm(
        problem.shape, tokens, finalists, incumbent, measure,
        rounds=rounds, tried=tried, failures=failures, in_graph=True,
    )  # fmt: skip
