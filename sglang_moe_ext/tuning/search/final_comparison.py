"""Compare whole layers with the incumbent: interleaved, repeated if the GPU slows down, then confirmed."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from sglang_moe_ext.core import Failure, MoEShape, Scheme
from sglang_moe_ext.few_tokens_config import FewTokensConfig
from sglang_moe_ext.schemes import NOT_QUANTIZED, SCHEMES
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchLayers,
    CheckAccuracy,
    LayerTimes,
    Measure,
    Runner,
    describe,
    identity,
)
from sglang_moe_ext.tuning.search.statistics import Interval, gain, typical_us

log = logging.getLogger(__name__)

_REPETITIONS = 2
"""How often a comparison is repeated in which the GPU slowed down."""


@dataclass(frozen=True, slots=True)
class ComparedLayer:
    """The times of one runner in an interleaved comparison.

    `samples`: microseconds of each round; `us`: their typical value; `gain`: over the incumbent, None without one.
    """

    samples: tuple[float, ...]
    us: float
    gain: Interval | None


@dataclass(frozen=True, slots=True)
class InterleavedComparison:
    """Results of one interleaved comparison, challengers in the order given. `incumbent` is None if there was none.

    `noise`: relative difference between the incumbent's two turns, None if it did not run. `times`: the measurement
    that all figures are from, None if none succeeded.
    """

    incumbent: ComparedLayer | Failure | None
    challengers: tuple[ComparedLayer | Failure, ...]
    noise: float | None
    times: LayerTimes | None


@dataclass(frozen=True, slots=True)
class _Entrants:
    """The runners to compare, by place. Place 0 is the incumbent's, missing where there is none."""

    tokens: int
    runners: dict[int, Runner]
    rounds: int
    data: int
    in_graph: bool

    def request(self, places: Sequence[int]) -> BenchLayers:
        """The incumbent runs first and last, which gives the noise."""
        turns = [*places, 0] if 0 in places else places
        entrants = tuple(self.runners[place] for place in turns)
        return BenchLayers(self.tokens, entrants, self.rounds, data=self.data, in_graph=self.in_graph)


def interleave(
    tokens: int,
    incumbent: Runner | None,
    challengers: Sequence[Runner],
    measure: Measure,
    *,
    rounds: int,
    data: int = 0,
    in_graph: bool = False,
) -> InterleavedComparison:
    """Compare all in one measurement; if it fails, those that run alone; then the incumbent with ever fewer of them."""
    runners = {place: pair for place, pair in enumerate((incumbent, *challengers)) if pair is not None}
    entrants = _Entrants(tokens, runners, rounds, data, in_graph)
    field, out = list(runners), dict[int, Failure]()
    result = _compare(entrants.request(field), measure) if field else None
    if isinstance(result, Failure):
        log.warning("M=%d: the comparison failed (%s: %s): trying one by one", tokens, result.kind, result.message)
        out = _failing_alone(entrants, measure)
        if out:
            field = [place for place in field if place not in out]
            result = _compare(entrants.request(field), measure) if field else None
    while isinstance(result, Failure):
        field, cut = _halved(field)
        log.warning(
            "M=%d: the comparison of those that run alone failed (%s): %d left", tokens, result.kind, len(field)
        )
        out |= dict.fromkeys(cut, _crowded(result))
        result = _compare(entrants.request(field), measure) if field else None
    found, noise = ({}, None) if result is None else _compared_layers(field, result)
    everyone: dict[int, ComparedLayer | Failure] = {**out, **found}
    places = range(1, len(challengers) + 1)
    return InterleavedComparison(everyone.get(0), tuple(everyone[place] for place in places), noise, result)


def _failing_alone(entrants: _Entrants, measure: Measure) -> dict[int, Failure]:
    """Those that fail in a round without the others."""
    found: dict[int, Failure] = {}
    for place, pair in entrants.runners.items():
        result = measure(
            BenchLayers(entrants.tokens, (pair,), rounds=1, data=entrants.data, in_graph=entrants.in_graph)
        )
        if isinstance(result, Failure):
            found[place] = result
            log.warning("M=%d: %s fails: %s: %s", entrants.tokens, describe(pair), result.kind, result.message)
    return found


def _halved(field: Sequence[int]) -> tuple[list[int], list[int]]:
    """(places kept: the incumbent and the first half of its challengers, or half of all without one; places cut)."""
    stay = (len(field) - 1) // 2 + 1 if field[0] == 0 and len(field) > 1 else len(field) // 2
    return list(field[:stay]), list(field[stay:])


def _crowded(why: Failure) -> Failure:
    return Failure(why.kind, f"runs alone, but not beside the others: {why.message}")


def _compare(layers: BenchLayers, measure: Measure, repetitions: int = _REPETITIONS) -> LayerTimes | Failure:
    """Measure, and repeat where the GPU slowed down meanwhile."""
    match measure(layers):
        case LayerTimes(throttled=str(why)) if repetitions:
            log.info("M=%d: the GPU slowed down (%s): measuring again", layers.tokens, why)
            return _compare(replace(layers, attempt=layers.attempt + 1), measure, repetitions - 1)
        case LayerTimes(throttled=str(why)) as result:
            log.warning("M=%d: the GPU slows down in every measurement (%s): taken as it is", layers.tokens, why)
            return result
        case LayerTimes() | Failure() as result:
            return result
        case result:
            raise TypeError(f"BenchLayers returned {result}")


def _compared_layers(field: Iterable[int], measured: LayerTimes) -> tuple[dict[int, ComparedLayer], float | None]:
    """Each runner's figures, and the noise; the incumbent's times are the first and the last."""
    turns = measured.routings
    if 0 not in field:
        alone = {
            place: ComparedLayer(us, typical_us(us, turns), None) for place, us in zip(field, measured.us, strict=True)
        }
        return alone, None
    first, *times, again = measured.us
    mean = tuple((one + other) / 2 for one, other in zip(first, again, strict=True))
    found = {0: ComparedLayer(mean, typical_us(mean, turns), Interval(1.0, 1.0, 1.0))}
    for place, us in zip((place for place in field if place), times, strict=True):
        found[place] = ComparedLayer(us, typical_us(us, turns), gain(mean, us, turns))
    differs = gain(first, again, turns).value
    return found, max(differs, 1 / differs) - 1


log = logging.getLogger(__name__)

R = TypeVar("R", bound=Runner)

LEAST_GAIN = 0.01
"""The incumbent stays unless it is beaten by more than this, and by more than it differs from itself."""
TOLERATED_ERROR: dict[Scheme | None, float] = {
    row.name: row.tolerated_error for row in (NOT_QUANTIZED, *SCHEMES.values())
}
"""Relative error of the whole layer against float32 that a right result stays under: 4e-3 seen for bf16, 2.3e-2 for
fp8 (H200). The reference takes quantized weights as they are stored, so they add nothing; eight-bit activations of the
down GEMM are quantized from what the up GEMM rounded otherwise than the reference."""
_TOLERATED_FLOAT32 = 1e-4
"""One product in TF32 instead of three would stay above it."""
_CONFIRMATIONS = 3
"""Confirmation runs at most, each of one challenger with the incumbent; each is one more chance to win by luck."""
_NEVER = Interval(math.inf, math.inf, math.inf)
"""The gain over an incumbent that does not run."""


@dataclass(frozen=True, slots=True)
class MeasuredChoice(Generic[R]):
    """The choice for one M. Times in microseconds, of the whole layer, from one interleaved comparison.

    `noise`: relative difference between the incumbent's two turns. Where the incumbent cannot run, `incumbent_us` and
    `gain` are infinite and `noise` is None. `tried` and `failures`: candidates screened, and its failures by kind.
    """

    pair: R
    us: float
    incumbent: R
    incumbent_us: float
    gain: Interval
    noise: float | None
    error: float
    tried: int
    failures: Mapping[str, int]
    throttled: bool
    sm_clock_mhz: int | None


@dataclass(frozen=True, slots=True)
class _Verdict(Generic[R]):
    """A runner with its figures beside the incumbent, and the measurement that they are from."""

    pair: R
    us: float
    incumbent_us: float
    gain: Interval
    noise: float | None
    times: LayerTimes


@dataclass(frozen=True, slots=True)
class _Comparison(Generic[R]):
    """What all steps for one M share. `errors`: relative errors of the runners checked so far, None for wrong ones."""

    shape: MoEShape
    tokens: int
    incumbent: R
    rounds: int
    measure: Measure
    errors: dict[Hashable, float | None]
    in_graph: bool = False


def is_right(shape: MoEShape, error: float | Failure, runner: Runner | None = None) -> bool:
    """Whether a layer with that relative error may serve.

    A plan for few tokens keeps activations in 16 bits whatever the weights are, and is held against the bound of those.
    """
    scheme = None if isinstance(runner, FewTokensConfig) else shape.quantization.scheme
    tolerated = _TOLERATED_FLOAT32 if shape.dtype == "float32" and scheme is None else TOLERATED_ERROR[scheme]
    return not isinstance(error, Failure) and error <= tolerated


def confirm(  # noqa: PLR0913 - the last two only pass through, into the noun that tells all of an M
    shape: MoEShape,
    tokens: int,
    finalists: Sequence[R],
    incumbent: R,
    measure: Measure,
    *,
    rounds: int,
    tried: int,
    failures: Mapping[str, int],
    in_graph: bool = False,
) -> MeasuredChoice[R] | None:
    """The first right finalist that beats the incumbent in a confirmation run, or the incumbent.

    A wrong incumbent is replaced by the fastest right finalist. None where no runner gives a right result.
    """
    challengers = [pair for place, pair in enumerate(finalists) if pair not in (incumbent, *finalists[:place])]
    comparison = _Comparison(shape, tokens, incumbent, rounds, measure, {}, in_graph)
    ranked = _rank(comparison, challengers, data=0)
    chosen = _winner(comparison, ranked) or _first_right(comparison, ranked)
    error = None if chosen is None else _tolerable_error(comparison, chosen.pair)
    if chosen is None or error is None:
        log.warning("M=%d: left out: nothing that runs there gave a right result", tokens)
        return None
    return MeasuredChoice(
        pair=chosen.pair,
        us=chosen.us,
        incumbent=incumbent,
        incumbent_us=chosen.incumbent_us,
        gain=chosen.gain,
        noise=chosen.noise,
        error=error,
        tried=tried,
        failures=failures,
        throttled=chosen.times.throttled is not None,
        sm_clock_mhz=chosen.times.sm_clock_mhz,
    )


def _rank(comparison: _Comparison[R], challengers: Sequence[R], data: int) -> list[_Verdict[R]]:
    """The runners that finished a comparison, by gain over the incumbent, which is one of them if it runs."""
    compared = interleave(
        comparison.tokens, comparison.incumbent, challengers, comparison.measure,
        rounds=comparison.rounds, data=data, in_graph=comparison.in_graph,
    )  # fmt: skip
    if compared.times is None:
        return []
    incumbent_us = compared.incumbent.us if isinstance(compared.incumbent, ComparedLayer) else math.inf
    everyone = zip((comparison.incumbent, *challengers), (compared.incumbent, *compared.challengers), strict=True)
    verdicts = [
        _Verdict(pair, layer.us, incumbent_us, layer.gain or _NEVER, compared.noise, compared.times)
        for pair, layer in everyone
        if isinstance(layer, ComparedLayer)
    ]
    return sorted(verdicts, key=lambda verdict: (-verdict.gain.value, verdict.us))


def _winner(comparison: _Comparison[R], ranked: Iterable[_Verdict[R]]) -> _Verdict[R] | None:
    """The first right one of the leaders that beats the incumbent again, in a confirmation run on other data."""
    leaders = (one for one in ranked if one.noise is not None and one.gain.low > 1 and one.gain.value > 1 + LEAST_GAIN)
    right = (one for one in leaders if _tolerable_error(comparison, one.pair) is not None)
    for one in itertools.islice(right, _CONFIRMATIONS):
        for again in _rank(comparison, [one.pair], data=1):
            if again.pair == one.pair and _is_beyond_doubt(again):
                return again
        log.info(
            "M=%d: %s led, but its confirmation run does not beat the incumbent", comparison.tokens, describe(one.pair)
        )
    return None


def _is_beyond_doubt(again: _Verdict[R]) -> bool:
    return again.noise is not None and again.gain.low > 1 and again.gain.value > 1 + max(LEAST_GAIN, again.noise)


def _first_right(comparison: _Comparison[R], ranked: Sequence[_Verdict[R]]) -> _Verdict[R] | None:
    """The incumbent if it runs and is right, else the fastest runner that is."""
    order = sorted(ranked, key=lambda verdict: verdict.pair != comparison.incumbent)
    return next((verdict for verdict in order if _tolerable_error(comparison, verdict.pair) is not None), None)


def _tolerable_error(comparison: _Comparison[R], pair: R) -> float | None:
    """The relative error of a pair that is right; None, with a warning the first time, of one that is not."""
    key = identity(pair)
    if key not in comparison.errors:
        comparison.errors[key] = _check(comparison, pair)
    return comparison.errors[key]


def _check(comparison: _Comparison[R], pair: R) -> float | None:
    tokens, name = comparison.tokens, describe(pair)
    result = comparison.measure(CheckAccuracy(tokens, pair))
    if isinstance(result, Accuracy):
        if is_right(comparison.shape, result.error, pair):
            return result.error
        log.warning("M=%d: %s is WRONG (relative error %.3g): left out", tokens, name, result.error)
    elif isinstance(result, Failure):
        log.warning("M=%d: %s cannot be checked (%s: %s): left out", tokens, name, result.kind, result.message)
    else:
        raise TypeError(f"CheckAccuracy returned {result}")
    return None
