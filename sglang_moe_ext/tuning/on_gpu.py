"""Measure every batch size: screen all of them, largest first, then decide each in a rematch with the incumbent."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from sglang_moe_ext.core import CompileKey, Failure, MoEExtError, Projection
from sglang_moe_ext.tuning import candidates, fleet, rematch, search
from sglang_moe_ext.tuning.budget import Budget
from sglang_moe_ext.tuning.candidates import Candidates
from sglang_moe_ext.tuning.journal import Journal
from sglang_moe_ext.tuning.questions import Answer, Ask, Pair, Question, Screen
from sglang_moe_ext.tuning.rematch import Measured
from sglang_moe_ext.tuning.request import Measuring, Progress, Request
from sglang_moe_ext.tuning.search import EFFORTS, Effort, Screening
from sglang_moe_ext.tuning.station import Station

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Task:
    """One batch size: what is to be timed there."""

    tokens: int
    listed: Candidates


def largest_first(listed: dict[int, Candidates]) -> list[Task]:
    """The order of the work: what takes longest comes first, so that several GPUs end together."""
    return [Task(m, listed[m]) for m in sorted(listed, reverse=True)]


def measure_all(
    request: Request,
    measuring: Measuring,
    tasks: Sequence[Task],
    incumbents: Callable[[], dict[int, Pair]],
    stations: Sequence[Station],
    journal: Journal,
    progress: Progress,
) -> dict[int, Measured]:
    """What was chosen for each M. `incumbents` are asked for when the screening is over: the engine may still think.

    Raises:
        MoEExtError: nothing ran right for any M, or no GPU answers any more.
    """
    counted = _Counted(progress, sum(len({c.compile_key for c in of}) for task in tasks for of in task.listed.values()))
    effort = EFFORTS[measuring.effort]
    budget = Budget(measuring.budget_s, len(tasks), len(stations))
    screenings = fleet.on_all(
        stations,
        [partial(_screen, request, effort, task, journal, counted, budget) for task in tasks],
        lambda done, of: None,
    )
    pairs = incumbents()
    for station in stations:
        station.want(job for m in pairs for job in candidates.pair_jobs(pairs[m], request.shape, m, request.gpu.sm))
    decided = fleet.on_all(
        stations,
        [
            partial(_decide, request, effort, task.tokens, screening, pairs[task.tokens], journal)
            for task, screening in zip(tasks, screenings, strict=True)
        ],
        lambda done, of: progress("proving", done, of),
    )
    results = {task.tokens: result for task, result in zip(tasks, decided, strict=True) if result is not None}
    if not results:
        raise MoEExtError(f"nothing ran right on {request.gpu.device_name} for any batch size: see -v for why")
    return dict(sorted(results.items()))


class _Counted:
    """Counts first screens, from the threads of all stations."""

    def __init__(self, progress: Progress, of: int) -> None:
        self._progress, self._of, self._done = progress, of, 0
        self._counting = threading.Lock()

    def __call__(self, ask: Ask) -> Ask:
        def counted(question: Question) -> Answer:
            answer = ask(question)
            if isinstance(question, Screen) and len(question.groups) == 1:
                with self._counting:
                    self._done += 1
                    self._progress("screening", min(self._done, self._of), self._of)
            return answer

        return counted


def _screen(
    request: Request, effort: Effort, task: Task, journal: Journal, counted: _Counted, budget: Budget, station: Station
) -> Screening:
    shape, sm = request.shape, request.gpu.sm
    station.want(candidates.screening_jobs(task.listed, shape, task.tokens, sm))

    def clean(projection: Projection, key: CompileKey) -> Failure | None:
        needs = station.binary(candidates.screening_job(shape, task.tokens, projection, key, sm))
        if isinstance(needs, Failure):
            return needs
        if needs.smem_bytes > request.gpu.smem_per_block:
            return Failure("OutOfResources", f"{needs.smem_bytes} B of shared memory")
        return None

    ask = counted(journal.through(station.ask))
    screening = search.screened(task.tokens, task.listed, effort, ask, clean, budget.share())
    for pair in search.finalists(screening, effort.finalists):
        station.want(candidates.pair_jobs(pair, shape, task.tokens, sm))
    return screening


def _decide(
    request: Request,
    effort: Effort,
    tokens: int,
    screening: Screening,
    incumbent: Pair,
    journal: Journal,
    station: Station,
) -> Measured | None:
    pairs = search.finalists(screening, effort.finalists)
    runnable: list[Pair] = []
    for pair in (incumbent, *pairs):  # waits for binaries, so that none is compiled while the race runs
        needs = [station.binary(job) for job in candidates.pair_jobs(pair, request.shape, tokens, request.gpu.sm)]
        failure = next((need for need in needs if isinstance(need, Failure)), None)
        if failure is None and pair != incumbent:
            runnable.append(pair)
        elif failure is not None:
            log.info("M=%d: %s left out: %s", tokens, pair, failure.message)
    return rematch.rematch(
        request.shape,
        tokens,
        runnable,
        incumbent,
        journal.through(station.ask),
        rounds=effort.rounds,
        tried=screening.tried,
        failures=screening.failures,
    )
