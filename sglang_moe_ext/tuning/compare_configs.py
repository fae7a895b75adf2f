"""Compare given configurations with today's, as whole layers, and check the accuracy of each; nothing is chosen."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sglang_moe_ext.core import CompileJob, Failure, TileConfig
from sglang_moe_ext.tuning import verify_install
from sglang_moe_ext.tuning.bench.messages import Accuracy, CheckAccuracy, Measure, Pair
from sglang_moe_ext.tuning.compile.kernel_source import kernel_source
from sglang_moe_ext.tuning.config_args import Choices
from sglang_moe_ext.tuning.incumbents import pairs_of
from sglang_moe_ext.tuning.request import MeasureOptions, Progress, TuneRequest
from sglang_moe_ext.tuning.run import session
from sglang_moe_ext.tuning.run.executor import Executor, run_tasks
from sglang_moe_ext.tuning.search import candidates, final_comparison
from sglang_moe_ext.tuning.search.screening import EFFORTS
from sglang_moe_ext.tuning.search.statistics import Interval

TODAY = "today"
"""The name of what the engine takes now."""

Trouble = Callable[[Pair], Failure | None]
"""What is known against a pair before it runs; waits for its binaries."""
_Configs = tuple[TileConfig, TileConfig]
"""A pair as a key."""


@dataclass(frozen=True, slots=True)
class TimedConfig:
    """`us`: of the whole layer; `gain`: over today's choice, None where that cannot run; `error`: relative."""

    us: float
    gain: Interval | None
    error: float | Failure


@dataclass(frozen=True, slots=True)
class ConfigComparison:
    """Each choice at one M, today's first.

    `noise`: by how much today's differs from itself, None where it cannot run; `throttled`: why the GPU slowed down in
    every measurement, None where it did not.
    """

    pairs: Mapping[str, Pair]
    results: Mapping[str, TimedConfig | Failure]
    noise: float | None
    throttled: str | None


def compare_all(
    tokens: int, today: Pair, given: Mapping[str, Pair], trouble: Trouble, measure: Measure, *, rounds: int
) -> ConfigComparison:
    """Compare all choices in one measurement, and check each that runs; one that cannot run costs itself alone."""
    pairs = {TODAY: today, **given}
    found = {configs: trouble(_pair(configs)) for configs in map(_configs, pairs.values())}
    results: dict[_Configs, TimedConfig | Failure] = {configs: why for configs, why in found.items() if why is not None}
    first, *others = found
    challengers = [configs for configs in others if configs not in results]
    incumbent = None if first in results else today
    compared = final_comparison.interleave(tokens, incumbent, list(map(_pair, challengers)), measure, rounds=rounds)
    for configs, result in zip((first, *challengers), (compared.incumbent, *compared.challengers), strict=True):
        match result:
            case final_comparison.ComparedLayer(_, us, over_today):
                results[configs] = TimedConfig(us, over_today, _error(CheckAccuracy(tokens, _pair(configs)), measure))
            case Failure():
                results[configs] = result
    return ConfigComparison(
        pairs=pairs,
        results={name: results[_configs(pair)] for name, pair in pairs.items()},
        noise=compared.noise,
        throttled=None if compared.times is None else compared.times.throttled,
    )


def _configs(pair: Pair) -> _Configs:
    return pair["up"], pair["down"]


def _pair(configs: _Configs) -> Pair:
    up, down = configs
    return {"up": up, "down": down}


def _error(check: CheckAccuracy, measure: Measure) -> float | Failure:
    match measure(check):
        case Accuracy(error):
            return error
        case Failure() as why:
            return why
        case result:
            raise TypeError(f"CheckAccuracy returned {result}")


def run(
    request: TuneRequest, measuring: MeasureOptions, given: Choices, progress: Progress
) -> dict[int, ConfigComparison]:
    """What is given beside today's choice, at each M of the request. No table and no run is written.

    Raises:
        MoEExtError: no GPU responds, or the engine does not say what it takes.
    """
    source = kernel_source(request.adapter.find(), request.adapter)
    rounds = EFFORTS[measuring.effort].rounds
    largest_first = sorted(request.tokens, reverse=True)
    with ExitStack() as ends:
        engine = ends.enter_context(closing(request.adapter.start_probe(verify_install.environment({}))))
        scratch = ends.enter_context(tempfile.TemporaryDirectory(prefix="sglang_moe_ext-", ignore_cleanup_errors=True))
        early = [job for m in largest_first for by_m in given.values() for job in _jobs(request, m, by_m[m])]
        executors = session.start_executors(request, measuring, source, Path(scratch), early, ends, progress)
        today = pairs_of(engine.answer(verify_install.lookup_request(request)))
        jobs = [*early, *(job for m in largest_first for job in _jobs(request, m, today[m]))]
        for executor in executors:
            executor.want(jobs)

        def compare(tokens: int, executor: Executor) -> ConfigComparison:
            for job in jobs:
                executor.binary(job)  # a compiler at work would disturb the comparison
            of_m = {name: by_m[tokens] for name, by_m in given.items()}
            trouble = partial(_trouble, request, tokens, executor)
            return compare_all(tokens, today[tokens], of_m, trouble, executor.measure, rounds=rounds)

        tasks = [partial(compare, tokens) for tokens in largest_first]
        found = run_tasks(executors, tasks, lambda done, of: progress("comparing", done, of))
    return dict(sorted(zip(largest_first, found, strict=True)))


def _jobs(request: TuneRequest, tokens: int, pair: Pair) -> list[CompileJob]:
    return candidates.pair_jobs(pair, request.problem, tokens)


def _trouble(request: TuneRequest, tokens: int, executor: Executor, pair: Pair) -> Failure | None:
    misfits = (candidates.misfit(job, executor.binary(job), request.gpu) for job in _jobs(request, tokens, pair))
    return next((misfit for misfit in misfits if misfit is not None), None)
