"""Compare backends of a layer: the engine's kernel, ours, and other libraries', whole layers in turn in one run."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sglang_moe_ext.core import PROJECTIONS, EngineError, Failure, Projection
from sglang_moe_ext.engines.lookup_probe import LookupResult
from sglang_moe_ext.gpu.roofline import gemm_floor, pair_floor_us
from sglang_moe_ext.kernel_plans import Plan, list_jobs
from sglang_moe_ext.tables.plan_table import KernelTable
from sglang_moe_ext.tuning import kernel_gains, verify_install
from sglang_moe_ext.tuning.bench import messages
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchGemm,
    CheckAccuracy,
    GemmTimes,
    LibraryLayer,
    Measure,
    Pair,
    Runner,
)
from sglang_moe_ext.tuning.compile.kernel_source import Job, kernel_source
from sglang_moe_ext.tuning.config_args import Choices
from sglang_moe_ext.tuning.incumbents import pairs_of
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.request import MeasureOptions, Progress, TuneRequest
from sglang_moe_ext.tuning.run import session
from sglang_moe_ext.tuning.run.executor import Executor, run_tasks
from sglang_moe_ext.tuning.search import candidates, final_comparison
from sglang_moe_ext.tuning.search.screening import EFFORTS
from sglang_moe_ext.tuning.search.statistics import Interval, typical_us

log = logging.getLogger(__name__)

TUNED, SHIPPED, OURS = "tuned", "shipped", "ours"
"""The engine's kernel as a server runs it beside which this package is installed; as the engine alone runs it; and the
plan of our own kernels that a table names."""
Against = Callable[[Runner], Failure | None]
"""What is known against a runner before it runs; waits for its binaries."""
OWN_BACKENDS = (TUNED, SHIPPED, OURS)
_GEMM_SAMPLES = 16


@dataclass(frozen=True, slots=True)
class TimedBackend:
    """`us`: of the whole layer; `gain`: how many times as fast as the first that runs; `error`: relative to float32.

    `gemm_us`: of each GEMM alone, known of the engine's kernel. `what`: the configuration or the plan.
    """

    us: float
    gain: Interval | None
    error: float
    what: str
    gemm_us: Mapping[Projection, float]


@dataclass(frozen=True, slots=True)
class BackendComparison:
    """All backends at one M, in the order that was asked for; a Failure says why one is left out.

    `floor_us`: the roofline of both GEMMs. `noise`: by how much the first that runs differs from itself; `throttled`:
    why the GPU slowed down in every measurement, None where it did not.
    """

    results: Mapping[str, TimedBackend | Failure]
    floor_us: float
    gemm_floor_us: Mapping[Projection, float]
    noise: float | None
    throttled: str | None


def run(
    request: TuneRequest, measuring: MeasureOptions, wanted: Sequence[str], given: Choices, progress: Progress
) -> dict[int, BackendComparison]:
    """Each backend of `wanted`, then what is given, at each M of the request. Nothing is written.

    Args:
        wanted: of OWN_BACKENDS, and keys of `engines.libraries.registry.LIBRARIES`.

    Raises:
        MoEExtError: no GPU responds, or the engine does not say what it takes.
    """
    source = kernel_source(request.adapter.find(), request.adapter)
    plans = kernel_gains.find_kernel_table(request.problem) if OURS in wanted else {}
    largest_first = sorted(request.tokens, reverse=True)
    with ExitStack() as ends:
        scratch = ends.enter_context(tempfile.TemporaryDirectory(prefix="sglang_moe_ext-", ignore_cleanup_errors=True))
        asked = _asked(request, wanted)
        runners = {
            m: _runners(wanted, asked, {name: by_m[m] for name, by_m in given.items()}, plans_at(plans, m), m)
            for m in largest_first
        }
        jobs = [job for m in largest_first for it in runners[m].values() for job in _jobs(request.problem, m, it)]
        executors = session.start_executors(request, measuring, source, Path(scratch), jobs, ends, progress)
        rounds = EFFORTS[measuring.effort].rounds

        def compare(tokens: int, executor: Executor) -> BackendComparison:
            for job in jobs:
                executor.binary(job)  # a compiler at work would disturb the comparison
            against = partial(_misfit, request.problem, tokens, executor)
            return compare_all(request.problem, tokens, runners[tokens], against, executor.measure, rounds=rounds)

        tasks = [partial(compare, tokens) for tokens in largest_first]
        found = run_tasks(executors, tasks, lambda done, of: progress("comparing", done, of))
    return dict(sorted(zip(largest_first, found, strict=True)))


def compare_all(
    problem: Problem,
    tokens: int,
    runners: Mapping[str, Runner | Failure],
    against: Against,
    measure: Measure,
    *,
    rounds: int,
) -> BackendComparison:
    """Check each, and compare those that are right in one measurement. The first of them is what gains are over."""
    out: dict[str, Failure] = {}
    errors: dict[str, float] = {}
    for name, runner in runners.items():
        checked = runner if isinstance(runner, Failure) else _check(problem, tokens, runner, against, measure)
        if isinstance(checked, Failure):
            out[name] = checked
        else:
            errors[name] = checked
    running = {name: runner for name, runner in runners.items() if name in errors and not isinstance(runner, Failure)}
    first, *others = running.values() or (None,)
    compared = final_comparison.interleave(
        tokens, first, [it for it in others if it is not None], measure, rounds=rounds
    )
    results: dict[str, TimedBackend | Failure] = dict(out)
    for (name, runner), result in zip(running.items(), (compared.incumbent, *compared.challengers), strict=False):
        if isinstance(result, final_comparison.ComparedLayer):
            gemms = _time_gemms(tokens, runner, measure) if isinstance(runner, dict) else {}
            what = messages.describe(runner)
            results[name] = TimedBackend(result.us, result.gain, errors[name], what, gemms)
        elif isinstance(result, Failure):
            results[name] = result
    return BackendComparison(
        results={name: results[name] for name in runners},
        floor_us=pair_floor_us(problem.shape, problem.gpu, tokens),
        gemm_floor_us={it: gemm_floor(problem.shape, problem.gpu, tokens, it).us for it in PROJECTIONS},
        noise=compared.noise,
        throttled=None if compared.times is None else compared.times.throttled,
    )


def plans_at(table: KernelTable, tokens: int) -> Plan | Failure:
    """Our plan of the nearest number of tokens in the table."""
    if not table:
        return Failure("NoPlan", "no plan of our kernels is known for this layer on this GPU: `tune` finds one")
    nearest = min(table, key=lambda m: (abs(m - tokens), m))
    plan = table[nearest].plan
    return plan or Failure("NoPlan", f"by the table the engine's kernel is faster at {nearest} tokens")


def _asked(request: TuneRequest, wanted: Sequence[str]) -> dict[str, LookupResult | Failure]:
    """What the engine says that it takes, as served and alone."""
    question = verify_install.lookup_request(request)
    found: dict[str, LookupResult | Failure] = {}
    for name, start in ((TUNED, request.adapter.start_probe), (SHIPPED, request.adapter.start_alone)):
        if name not in wanted:
            continue
        try:
            with closing(start(verify_install.environment({}))) as engine:
                found[name] = engine.answer(question)
        except EngineError as error:
            found[name] = Failure("EngineError", str(error))
    return found


def _runners(
    wanted: Sequence[str],
    asked: Mapping[str, LookupResult | Failure],
    given: Mapping[str, Pair],
    ours: Plan | Failure,
    tokens: int,
) -> dict[str, Runner | Failure]:
    """By name, in order. A pair that stands there already is no second runner: it would be timed twice."""
    found: dict[str, Runner | Failure] = {}
    for name in wanted:
        answer = asked.get(name)
        if isinstance(answer, LookupResult):
            found[name] = pairs_of(answer)[tokens]
        elif isinstance(answer, Failure):
            found[name] = answer
        else:
            found[name] = ours if name == OURS else LibraryLayer(name)
    found.update(given)
    if isinstance(found.get(TUNED), dict) and found.get(TUNED) == found.get(SHIPPED):
        found[SHIPPED] = Failure("Same", f"as {TUNED}: no table of ours is in use there")
    return found


def _jobs(problem: Problem, tokens: int, runner: Runner | Failure) -> Sequence[Job]:
    match runner:
        case dict():
            alone = [candidates.screening_job(problem, tokens, it, config.compile_key) for it, config in runner.items()]
            return [*candidates.pair_jobs(runner, problem, tokens), *alone]
        case LibraryLayer() | Failure():
            return []
        case plan:
            return list_jobs(plan, problem.shape, tokens, problem.gpu.sm)


def _misfit(problem: Problem, tokens: int, executor: Executor, runner: Runner) -> Failure | None:
    jobs = _jobs(problem, tokens, runner)
    found = (candidates.misfit(job, executor.binary(job), problem.gpu) for job in jobs)
    return next((it for it in found if it is not None), None)


def _check(problem: Problem, tokens: int, runner: Runner, against: Against, measure: Measure) -> float | Failure:
    """The error of a runner that is right."""
    if (misfit := against(runner)) is not None:
        return misfit
    match measure(CheckAccuracy(tokens, runner)):
        case Accuracy(error) if final_comparison.is_right(problem.shape, error, runner):
            return error
        case Accuracy(error):
            return Failure("Wrong", f"its error against float32 is {error:.1e}")
        case Failure() as why:
            log.info("M=%d: %s is left out: %s", tokens, messages.describe(runner), why.message)
            return why
        case result:
            raise TypeError(f"CheckAccuracy returned {result}")


def _time_gemms(tokens: int, pair: Pair, measure: Measure) -> dict[Projection, float]:
    """Microseconds of each GEMM alone, where it could be timed."""
    found: dict[Projection, float] = {}
    for projection, config in pair.items():
        answer = measure(BenchGemm(tokens, projection, config.compile_key, (config.group_m,), _GEMM_SAMPLES))
        if isinstance(answer, GemmTimes) and answer.us[0]:
            found[projection] = typical_us(answer.us[0], 1)
    return found


def with_and_without_tma(given: Choices, projections: Sequence[Projection]) -> Choices:
    """Each choice, and each with USE_TMA in the GEMMs of `projections` where it has none."""
    found: Choices = {}
    for name, by_m in given.items():
        found[name] = by_m
        if not projections or any(config.use_tma for pair in by_m.values() for config in pair.values()):
            continue
        found[f"{name}, TMA"] = {
            m: {it: replace(config, use_tma=it in projections) for it, config in pair.items()}
            for m, pair in by_m.items()
        }
    return found
