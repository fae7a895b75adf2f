"""Measure every batch size: screen all of them, largest first, then compare the best of each with the incumbent."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from sglang_moe_ext.core import CompileKey, Failure, MoEExtError, Projection, Resources
from sglang_moe_ext.kernel_plans import Plan, list_jobs
from sglang_moe_ext.tuning.bench.messages import BenchGemm, BenchRequest, BenchResult, Measure, Pair, Runner
from sglang_moe_ext.tuning.compile.kernel_source import Job
from sglang_moe_ext.tuning.compile.processes import UNABLE
from sglang_moe_ext.tuning.request import MeasureOptions, Progress, TuneRequest
from sglang_moe_ext.tuning.run.executor import Executor, run_tasks
from sglang_moe_ext.tuning.run.journal import Journal
from sglang_moe_ext.tuning.search import candidates, few_tokens_space, final_comparison, sorted_kernel_space
from sglang_moe_ext.tuning.search import screening as search
from sglang_moe_ext.tuning.search.candidates import Candidates
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice
from sglang_moe_ext.tuning.search.screening import EFFORTS, KEPT_FOR_COMPARISONS, Budget, Effort, Screening, Times

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SearchTask:
    """One batch size: what is to be timed there."""

    tokens: int
    listed: Candidates


def largest_first(listed: dict[int, Candidates]) -> list[SearchTask]:
    """The order of the work: what takes longest comes first, so that several GPUs end together."""
    return [SearchTask(m, listed[m]) for m in sorted(listed, reverse=True)]


def spread(tasks: Sequence[SearchTask]) -> list[SearchTask]:
    """Tasks in an order whose every beginning is spread over all of them: both ends, then always the middle of a gap.

    A deadline cuts the rest off. What was compared then lies near what was not, whose batches run its entries.
    """
    gaps, order = deque([(0, len(tasks) - 1)]), [*tasks[:1], *tasks[1:][-1:]]
    while gaps:
        low, high = gaps.popleft()
        middle = (low + high) // 2
        if low < middle < high:
            order.append(tasks[middle])
            gaps += (low, middle), (middle, high)
    return order


@dataclass(frozen=True, slots=True)
class SearchResults:
    """By M, the pair chosen for the engine's kernels, and the winner where our kernels were compared with it."""

    pairs: dict[int, MeasuredChoice[Pair]]
    plans: dict[int, MeasuredChoice[Runner]]


def measure_all(
    request: TuneRequest,
    measuring: MeasureOptions,
    tasks: Sequence[SearchTask],
    incumbents: Callable[[], dict[int, Pair]],
    executors: Sequence[Executor],
    journal: Journal,
    progress: Progress,
) -> SearchResults:
    """What was chosen for each M. `incumbents` is called after the screening: the engine may be starting until then.

    Raises:
        MoEExtError: nothing ran right for any M, or no GPU responds any more.
    """
    tasks = tasks if measuring.deadline is None else spread(tasks)
    counted = _Counted(progress, sum(len({c.compile_key for c in of}) for task in tasks for of in task.listed.values()))
    _get_ready(executors, request, tasks, measuring)
    kept = KEPT_FOR_COMPARISONS if measuring.deadline is None else _KEPT_BEFORE_DEADLINE
    budget = Budget(_search_s(measuring), len(tasks), len(executors), kept=kept)
    search_of = _Search(request, measuring, journal, budget, counted)
    screenings = run_tasks(
        executors,
        [partial(_screen, search_of, task) for task in tasks],
        lambda done, of: None,
    )
    pairs = incumbents()
    decided = run_tasks(
        executors,
        [
            partial(_decide, search_of, task.tokens, screening, pairs[task.tokens])
            for task, screening in zip(tasks, screenings, strict=True)
        ],
        lambda done, of: progress("comparing", done, of),
    )
    found = [(task.tokens, one) for task, one in zip(tasks, decided, strict=True) if one is not None]
    results = {tokens: one.chosen for tokens, one in found}
    if not results and not search_of.may_start():
        raise MoEExtError("the deadline came before any batch size was compared: give more seconds")
    if not results:
        failures = sum((Counter(screening.failures) for screening in screenings), Counter[str]())
        why = ", ".join(f"{kind} {count} times" for kind, count in failures.most_common(3)) or "no candidate was timed"
        raise MoEExtError(f"nothing ran right on {request.gpu.device_name} for any batch size ({why}): -v says more")
    plans: dict[int, MeasuredChoice[Runner]] = {}
    if measuring.with_own_kernels:
        with_ours = run_tasks(
            executors,
            [partial(_compare_own_kernels, search_of, tokens, one) for tokens, one in found],
            lambda done, of: progress("comparing our kernels", done, of),
        )
        plans = {tokens: plan for (tokens, _), plan in zip(found, with_ours, strict=True) if plan is not None}
    return SearchResults(dict(sorted(results.items())), dict(sorted(plans.items())))


def _get_ready(
    executors: Sequence[Executor], request: TuneRequest, tasks: Sequence[SearchTask], measuring: MeasureOptions
) -> None:
    """Where a budget runs, wait until there is something to spend it on: engines take long to import."""
    if measuring.budget_s is None and measuring.deadline is None:
        return
    first = candidates.screening_jobs(tasks[0].listed, request.problem, tasks[0].tokens)[0]
    for executor in executors:
        with suppress(MoEExtError):  # the tasks will meet it, and have others to turn to
            executor.binary(first)
            executor.get_ready()


_KEPT_BEFORE_DEADLINE = 0.5
"""Share of the time until a deadline that is no screening's: all batch sizes' pairs are compared in it, and then, of as
many as it lasts for, our kernels."""
_FOR_THE_END_S = 4.0
"""Before a deadline: the comparison that has begun, the writing of tables, the end of the processes."""


def _last_start(measuring: MeasureOptions) -> float:
    """Until when a final comparison may begin, by time.monotonic()."""
    return math.inf if measuring.deadline is None else measuring.deadline - _FOR_THE_END_S


def _search_s(measuring: MeasureOptions) -> float | None:
    """Seconds for screening and final comparisons from now on, None for no limit."""
    if measuring.deadline is None:
        return measuring.budget_s
    left = max(_last_start(measuring) - time.monotonic(), 0.0)
    return left if measuring.budget_s is None else min(left, measuring.budget_s)


class _Counted:
    """Counts first screens, from the threads of all executors."""

    def __init__(self, progress: Progress, of: int) -> None:
        self._progress, self._of, self._done = progress, of, 0
        self._counting = threading.Lock()

    def __call__(self, measure: Measure) -> Measure:
        def counted(request: BenchRequest) -> BenchResult:
            result = measure(request)
            if isinstance(request, BenchGemm) and len(request.groups) == 1:
                with self._counting:
                    self._done += 1
                    self._progress("screening", min(self._done, self._of), self._of)
            return result

        return counted


@dataclass(frozen=True, slots=True)
class _Search:
    """What all tasks of a run have in common."""

    request: TuneRequest
    measuring: MeasureOptions
    journal: Journal
    budget: Budget
    counted: _Counted

    @property
    def effort(self) -> Effort:
        return EFFORTS[self.measuring.effort]

    def may_start(self) -> bool:
        """Whether a final comparison may begin."""
        return time.monotonic() < _last_start(self.measuring)

    def has_time_for_own_kernels(self) -> bool:
        """Neither is a budget overrun for them, nor a deadline."""
        return self.may_start() and (self.measuring.budget_s is None or not self.budget.is_spent())

    def fastest_keys(self, times: Times, count: int) -> dict[Projection, list[CompileKey]]:
        of_both = search.fastest_shared_keys
        return (search.fastest_keys if self.request.adapter.HAS_DOWN_TABLES else of_both)(times, count)

    def finalists(self, screening: Screening, count: int) -> list[Pair]:
        of_both = search.shared_finalists
        return (search.finalists if self.request.adapter.HAS_DOWN_TABLES else of_both)(screening, count)


def _binary(executor: Executor, job: Job) -> Resources | Failure:
    """What the binary needs.

    Raises:
        MoEExtError: nothing can be compiled any more, which says nothing of this binary.
    """
    needs = executor.binary(job)
    if isinstance(needs, Failure) and needs.kind == UNABLE:
        raise MoEExtError(f"nothing can be compiled: {needs.message}")
    return needs


def _screen(of: _Search, task: SearchTask, executor: Executor) -> Screening:
    problem = of.request.problem
    executor.want(candidates.screening_jobs(task.listed, problem, task.tokens))

    def clean(projection: Projection, key: CompileKey) -> Failure | None:
        job = candidates.screening_job(problem, task.tokens, projection, key)
        return candidates.misfit(job, _binary(executor, job), problem.gpu)

    measure = of.counted(of.journal.through(executor.measure))
    screening = search.screen(task.tokens, task.listed, of.effort, measure, clean, of.budget.share(), of.fastest_keys)
    for pair in of.finalists(screening, of.effort.finalists):
        executor.want(candidates.pair_jobs(pair, problem, task.tokens))
    if of.measuring.with_own_kernels:
        executor.want(few_tokens_space.jobs(problem, task.tokens))
        if of.request.adapter.takes_sorted(of.request.shape):
            executor.want(sorted_kernel_space.screening_jobs(problem, task.tokens))
    return screening


@dataclass(frozen=True, slots=True)
class _Decided:
    """The pair chosen for the engine's kernels at one M, and the finalists that it was compared with."""

    chosen: MeasuredChoice[Pair]
    finalists: list[Pair]


def _decide(of: _Search, tokens: int, screening: Screening, incumbent: Pair, executor: Executor) -> _Decided | None:
    """The pair chosen for the engine's kernels, if there is one."""
    if not of.may_start():
        log.warning("M=%d: left out: its comparison could not begin before the deadline", tokens)
        return None
    pairs = of.finalists(screening, 1 if of.budget.is_spent() else of.effort.finalists)
    if not pairs:
        log.warning("M=%d: left out: no candidate ran (%s)", tokens, ", ".join(screening.failures) or "none was timed")
        return None
    shape, problem = of.request.shape, of.request.problem
    jobs = [candidates.pair_jobs(pair, problem, tokens) for pair in (incumbent, *pairs)]
    executor.want(job for of_pair in jobs for job in of_pair)  # another executor may have screened
    runnable: list[Pair] = []
    for pair, of_pair in zip((incumbent, *pairs), jobs, strict=True):
        # Waits for binaries, so that none is compiled during the comparison.
        failure = next((need for job in of_pair if isinstance(need := _binary(executor, job), Failure)), None)
        if failure is None and pair != incumbent:
            runnable.append(pair)
        elif failure is not None:
            log.info("M=%d: up %s, down %s left out: %s", tokens, pair["up"], pair["down"], failure.message)
    measure, rounds = of.journal.through(executor.measure), of.effort.rounds
    chosen = final_comparison.confirm(
        shape, tokens, runnable, incumbent, measure, rounds=rounds, tried=screening.tried, failures=screening.failures
    )
    return None if chosen is None else _Decided(chosen, runnable)


def _compare_own_kernels(
    of: _Search, tokens: int, decided: _Decided, executor: Executor
) -> MeasuredChoice[Runner] | None:
    """The winner of the comparison of the chosen pair with our kernels; None where there is none."""
    if not of.has_time_for_own_kernels():
        return None
    shape, problem, pair = of.request.shape, of.request.problem, decided.chosen.pair
    measure, rounds = of.journal.through(executor.measure), of.effort.rounds
    executor.want(few_tokens_space.jobs(problem, tokens))
    adapter = of.request.adapter
    runs_sorted = adapter.takes_sorted(shape)
    ups = [each["up"] for each in (pair, *decided.finalists)] if adapter.SORTS_ITS_UP else []
    if runs_sorted:
        executor.want(sorted_kernel_space.screening_jobs(problem, tokens, ups))

    def clean(plan: Plan) -> Failure | None:
        troubles = (
            candidates.misfit(job, _binary(executor, job), problem.gpu)
            for job in list_jobs(plan, shape, tokens, problem.gpu.sm)
        )
        return next((trouble for trouble in troubles if trouble is not None), None)

    if few_tokens_space.contenders(problem, tokens):
        return few_tokens_space.compare_plans(problem, tokens, pair, measure, clean, rounds=rounds)
    if not runs_sorted:
        return None
    return sorted_kernel_space.compare_plans(problem, tokens, pair, ups, measure, clean, rounds=rounds)
