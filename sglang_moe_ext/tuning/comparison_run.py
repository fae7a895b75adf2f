"""A comparison on the GPUs that the flags want: binaries first, then each M raced and checked; no table is written."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from sglang_moe_ext.core import CompileJob, Failure
from sglang_moe_ext.tuning import candidates, fleet, measured_run, pickup
from sglang_moe_ext.tuning.comparison import Compared, compared
from sglang_moe_ext.tuning.given_configs import Choices
from sglang_moe_ext.tuning.questions import Pair
from sglang_moe_ext.tuning.request import Measuring, Progress, Request
from sglang_moe_ext.tuning.search import EFFORTS
from sglang_moe_ext.tuning.sources import kernel_source
from sglang_moe_ext.tuning.station import Station


def run(request: Request, measuring: Measuring, given: Choices, progress: Progress) -> dict[int, Compared]:
    """What is given beside today's choice, at each M of the request. No table and no run is written.

    Raises:
        MoEExtError: no GPU answers, or the engine does not say what it takes.
    """
    source = kernel_source(request.tunable.find(), request.tunable)
    rounds = EFFORTS[measuring.effort].rounds
    largest_first = sorted(request.tokens, reverse=True)
    with ExitStack() as ends:
        engine = ends.enter_context(closing(request.tunable.asked(pickup.environment({}))))
        scratch = ends.enter_context(tempfile.TemporaryDirectory(prefix="sglang_moe_ext-", ignore_cleanup_errors=True))
        early = [job for m in largest_first for by_m in given.values() for job in _jobs(request, m, by_m[m])]
        stations = measured_run.hired(request, measuring, source, Path(scratch), early, ends, progress)
        today = pickup.pairs_of(engine.answer(pickup.question(request)))
        jobs = [*early, *(job for m in largest_first for job in _jobs(request, m, today[m]))]
        for station in stations:
            station.want(jobs)

        def compare(tokens: int, station: Station) -> Compared:
            for job in jobs:
                station.binary(job)  # a compiler at work would disturb a race
            of_m = {name: by_m[tokens] for name, by_m in given.items()}
            trouble = partial(_trouble, request, tokens, station)
            return compared(tokens, today[tokens], of_m, trouble, station.ask, rounds=rounds)

        tasks = [partial(compare, tokens) for tokens in largest_first]
        found = fleet.on_all(stations, tasks, lambda done, of: progress("racing", done, of))
    return dict(sorted(zip(largest_first, found, strict=True)))


def _jobs(request: Request, tokens: int, pair: Pair) -> list[CompileJob]:
    return candidates.pair_jobs(pair, request.shape, tokens, request.gpu.sm, request.tunable)


def _trouble(request: Request, tokens: int, station: Station, pair: Pair) -> Failure | None:
    misfits = (candidates.misfit(job, station.binary(job), request.gpu) for job in _jobs(request, tokens, pair))
    return next((misfit for misfit in misfits if misfit is not None), None)
