"""Race several choices of configurations for one layer on this machine's GPU: whole layers in turn; is each right?"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sglang_moe_ext.core import EngineError, Failure, Gpu, GpuError, MoEShape
from sglang_moe_ext.engines.registry import SGLANG
from sglang_moe_ext.engines.sglang import installation
from sglang_moe_ext.engines.sglang.installation import SglangInstallation
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.tuning.bench.gpu_bench import BenchSetup
from sglang_moe_ext.tuning.bench.messages import Accuracy, CheckAccuracy, Measure, Pair
from sglang_moe_ext.tuning.bench.routing import RoutingSource
from sglang_moe_ext.tuning.bench.worker import BenchProcess
from sglang_moe_ext.tuning.compile.cache import CompileCache
from sglang_moe_ext.tuning.compile.kernel_source import kernel_source
from sglang_moe_ext.tuning.compile.pool import compile_all
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.request import TuneRequest
from sglang_moe_ext.tuning.search import candidates, final_comparison, statistics
from sglang_moe_ext.tuning.search.statistics import Interval

ROUNDS = 32
SEED = 1000
"""Far from those that a search takes: weights, inputs and routings of the race are new to every choice."""


def here() -> tuple[Gpu, SglangInstallation]:
    """This machine's GPU and engine, for a benchmark to ask for before it begins.

    Raises:
        GpuError: there is no GPU here, or an unknown one.
        EngineError: there is no engine.
    """
    gpu, engine = specs.detect(), installation.find()
    if gpu is None:
        raise GpuError("this machine has no GPU: this benchmark needs one, so run it where it is")
    if engine is None:
        raise EngineError("SGLang is not installed here: this benchmark measures its kernel, so run it where it is")
    return gpu, engine


@dataclass(frozen=True, slots=True)
class Track:
    """What is raced: a layer, on that GPU, which is this machine's, with routings from that source."""

    shape: MoEShape
    gpu: Gpu
    routing: RoutingSource
    seed: int = SEED


def track_of(request: TuneRequest) -> Track:
    """That of a measuring run, with other data than its own.

    Raises:
        EngineError: the run does not measure, or not here.
    """
    if request.measuring is None or not request.gpu_is_here:
        raise EngineError(f"{request.command}: expected a run that measures on this machine's GPU")
    return Track(request.shape, request.gpu, request.measuring.routing, request.seed + SEED)


@dataclass(frozen=True, slots=True)
class Runner:
    """A choice after the race: microseconds of the layer in each round, or why it cannot run.

    `error`: relative, to the float32 reference; None where it is not known.
    """

    pair: Pair
    us: tuple[float, ...] | Failure
    error: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The race of one M, by the name of who chose; round r took routing r % `routings`.

    `throttled`: why the GPU slowed down meanwhile, None where it did not.
    """

    by_name: dict[str, Runner]
    routings: int = 1
    throttled: str | None = None

    def samples(self, name: str) -> tuple[float, ...] | None:
        """As `us`, of each round."""
        runner = self.by_name.get(name)
        return None if runner is None or isinstance(runner.us, Failure) else runner.us

    def us(self, name: str) -> float | None:
        """Of that choice; None where it does not run, or chose nothing."""
        times = self.samples(name)
        return None if times is None else statistics.typical_us(times, self.routings)

    def gain(self, of: str, to: str) -> Interval | None:
        """How many times faster `to` is than `of`; None where one of them has no times."""
        before, after = self.samples(of), self.samples(to)
        return None if before is None or after is None else statistics.gain(before, after, self.routings)

    def document(self) -> dict[str, object]:
        """For programs; gains are over the first choice."""
        first = next(iter(self.by_name))
        return {name: self._told(name, runner, self.gain(first, name)) for name, runner in self.by_name.items()}

    def _told(self, name: str, runner: Runner, gain: Interval | None) -> dict[str, object]:
        us = self.us(name)
        return {
            "pair": {projection: asdict(config) for projection, config in runner.pair.items()},
            "us": None if us is None else round(us, 2),
            "failure": runner.us.kind if isinstance(runner.us, Failure) else None,
            "gain": None if gain is None else round(gain.value, 4),
            "gain_95": None if gain is None else [round(gain.low, 4), round(gain.high, 4)],
            "error": runner.error,
        }


def raced(track: Track, choices: Mapping[str, Mapping[int, Pair]], rounds: int = ROUNDS) -> dict[int, Outcome]:
    """For each M the race of those that chose something for it, with cold L2, in a process that compiles nothing.

    Raises:
        MoEExtError: the process does not start.
    """
    by_tokens = _by_tokens(choices)
    with tempfile.TemporaryDirectory() as triton_cache:
        jobs = [
            job
            for m, of_m in by_tokens.items()
            for pair in of_m.values()
            for job in candidates.pair_jobs(pair, Problem(track.shape, track.gpu, "sglang"), m)
        ]
        source = kernel_source(SGLANG.find(), SGLANG)
        compile_all(source, jobs, cache=CompileCache(None), triton_cache=Path(triton_cache))
        worker = BenchProcess(BenchSetup(track.shape, track.routing, track.seed, Path(triton_cache), "sglang"))
        try:
            return {m: compare(m, of_m, worker.measure, rounds) for m, of_m in by_tokens.items()}
        finally:
            worker.close()


def _by_tokens(choices: Mapping[str, Mapping[int, Pair]]) -> dict[int, dict[str, Pair]]:
    """The same, M by M, ascending."""
    tokens = sorted({m for of_choice in choices.values() for m in of_choice})
    return {m: {name: of_choice[m] for name, of_choice in choices.items() if m in of_choice} for m in tokens}


def compare(tokens: int, choices: Mapping[str, Pair], measure: Measure, rounds: int) -> Outcome:
    """Race those that run, the first choice first and last; check each. A Failure is told, and stops no other."""
    first, *challengers = choices.values()
    compared = final_comparison.interleave(tokens, first, challengers, measure, rounds=rounds)
    runners: dict[str, Runner] = {}
    for (name, pair), result in zip(choices.items(), (compared.incumbent, *compared.challengers), strict=True):
        match result:
            case final_comparison.ComparedLayer(samples):
                runners[name] = Runner(pair, samples, _error(tokens, pair, measure))
            case Failure():
                runners[name] = Runner(pair, result)
    raced = compared.times
    return Outcome(runners) if raced is None else Outcome(runners, raced.routings, raced.throttled)


def _error(tokens: int, pair: Pair, measure: Measure) -> float | None:
    result = measure(CheckAccuracy(tokens, pair))
    return result.error if isinstance(result, Accuracy) else None


def geomean(outcomes: Mapping[int, Outcome], of: str, to: str) -> float:
    """Of the gains, over the batch sizes at which both run; not a number where there is none."""
    gains = [gain.value for outcome in outcomes.values() if (gain := outcome.gain(of, to)) is not None]
    return math.exp(math.fsum(map(math.log, gains)) / len(gains)) if gains else math.nan
