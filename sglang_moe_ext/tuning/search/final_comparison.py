"""Race whole layers against an incumbent: all that can, again where the GPU slowed down; one failure stops no other."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from sglang_moe_ext.core import Failure, MoEShape, Scheme
from sglang_moe_ext.schemes import NOT_QUANTIZED, SCHEMES
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    Ask,
    BenchLayers,
    CheckAccuracy,
    LayerTimes,
    Runner,
    describe,
    identity,
)
from sglang_moe_ext.tuning.search.statistics import Interval, gain, typical_us

log = logging.getLogger(__name__)

_REPETITIONS = 2
"""Of a race in which the GPU slowed down."""


@dataclass(frozen=True, slots=True)
class ComparedLayer:
    """A pair that came to the end of the race.

    `samples`: microseconds of each round, `us`: what is typical of them; `gain`: over the incumbent, None where that
    is not in the race.
    """

    samples: tuple[float, ...]
    us: float
    gain: Interval | None


@dataclass(frozen=True, slots=True)
class InterleavedComparison:
    """What became of everyone; `incumbent` is None where there is none, and the rivals stand in the order given.

    `noise`: by how much the incumbent differs from itself, None where it is not in the race. `raced`: the race that the
    times are from, None where none came to its end.
    """

    incumbent: ComparedLayer | Failure | None
    rivals: tuple[ComparedLayer | Failure, ...]
    noise: float | None
    raced: LayerTimes | None


@dataclass(frozen=True, slots=True)
class _Field:
    """Who is to race, by place; place 0 is the incumbent's, and empty where there is none."""

    tokens: int
    starters: dict[int, Runner]
    rounds: int
    data: int

    def race(self, places: Sequence[int]) -> BenchLayers:
        """The incumbent comes first and last, which says how much it differs from itself."""
        entered = [*places, 0] if 0 in places else places
        return BenchLayers(self.tokens, tuple(self.starters[place] for place in entered), self.rounds, data=self.data)


def interleave(
    tokens: int, incumbent: Runner | None, rivals: Sequence[Runner], ask: Ask, *, rounds: int, data: int = 0
) -> InterleavedComparison:
    """One race of all; where it fails, of those that run alone; then of the incumbent and ever fewer of them."""
    starters = {place: pair for place, pair in enumerate((incumbent, *rivals)) if pair is not None}
    card = _Field(tokens, starters, rounds, data)
    field, out = list(starters), dict[int, Failure]()
    answer = _compare(card.race(field), ask) if field else None
    if isinstance(answer, Failure):
        log.warning("M=%d: the race failed (%s: %s): trying one by one", tokens, answer.kind, answer.message)
        out = _failing_alone(card, ask)
        if out:
            field = [place for place in field if place not in out]
            answer = _compare(card.race(field), ask) if field else None
    while isinstance(answer, Failure):
        field, cut = _halved(field)
        log.warning("M=%d: the race of those that run alone failed (%s): %d left", tokens, answer.kind, len(field))
        out |= dict.fromkeys(cut, _crowded(answer))
        answer = _compare(card.race(field), ask) if field else None
    found, noise = ({}, None) if answer is None else _compared_layers(field, answer)
    everyone: dict[int, ComparedLayer | Failure] = {**out, **found}
    places = range(1, len(rivals) + 1)
    return InterleavedComparison(everyone.get(0), tuple(everyone[place] for place in places), noise, answer)


def _failing_alone(card: _Field, ask: Ask) -> dict[int, Failure]:
    """Those that fail in a round of their own."""
    found: dict[int, Failure] = {}
    for place, pair in card.starters.items():
        answer = ask(BenchLayers(card.tokens, (pair,), rounds=1, data=card.data))
        if isinstance(answer, Failure):
            found[place] = answer
            log.warning("M=%d: %s fails: %s: %s", card.tokens, describe(pair), answer.kind, answer.message)
    return found


def _halved(field: Sequence[int]) -> tuple[list[int], list[int]]:
    """(who stays: the incumbent and the first half of its rivals, or of all where it is out; who is cut)."""
    stay = (len(field) - 1) // 2 + 1 if field[0] == 0 and len(field) > 1 else len(field) // 2
    return list(field[:stay]), list(field[stay:])


def _crowded(why: Failure) -> Failure:
    return Failure(why.kind, f"runs alone, but not in a race with the others: {why.message}")


def _compare(race: BenchLayers, ask: Ask, repetitions: int = _REPETITIONS) -> LayerTimes | Failure:
    """The answer to a race, which is run again where the GPU slowed down meanwhile."""
    match ask(race):
        case LayerTimes(throttled=str(why)) if repetitions:
            log.info("M=%d: the GPU slowed down in the race (%s): racing again", race.tokens, why)
            return _compare(replace(race, attempt=race.attempt + 1), ask, repetitions - 1)
        case LayerTimes(throttled=str(why)) as answer:
            log.warning("M=%d: the GPU slows down in every race (%s): taken as it is", race.tokens, why)
            return answer
        case LayerTimes() | Failure() as answer:
            return answer
        case answer:
            raise TypeError(f"a Race was answered by {answer}")


def _compared_layers(field: Iterable[int], raced: LayerTimes) -> tuple[dict[int, ComparedLayer], float | None]:
    """What the times say, and the noise; those of an incumbent are the first and the last."""
    turns = raced.routings
    if 0 not in field:
        alone = {
            place: ComparedLayer(us, typical_us(us, turns), None) for place, us in zip(field, raced.us, strict=True)
        }
        return alone, None
    first, *times, again = raced.us
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
"""Relative error of the whole layer against float32 that a right result stays under."""
_MEETINGS = 3
"""With the incumbent alone, of so many that led; each is one more chance to win by luck."""
_NEVER = Interval(math.inf, math.inf, math.inf)
"""The gain over what does not run: it would take for ever."""


@dataclass(frozen=True, slots=True)
class MeasuredChoice(Generic[R]):
    """What was chosen for one M. Times in microseconds, of the whole layer, from one race.

    Of an incumbent that cannot run, `incumbent_us` and `gain` are infinite, and `noise` is None; else it is by how much
    the incumbent differs from itself. `tried` and `failures`: candidates of the screening, and kinds of failure there.
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
    """Who is to serve, and the race that says how fast it is beside the incumbent."""

    pair: R
    us: float
    incumbent_us: float
    gain: Interval
    noise: float | None
    raced: LayerTimes


@dataclass(frozen=True, slots=True)
class _Comparison(Generic[R]):
    """What all steps of the rematch of one M need; `errors` of the pairs that were checked, None of the wrong ones."""

    shape: MoEShape
    tokens: int
    incumbent: R
    rounds: int
    ask: Ask
    errors: dict[Hashable, float | None]


def is_right(shape: MoEShape, error: float | Failure) -> bool:
    """True where a layer with that relative error may serve."""
    return not isinstance(error, Failure) and error <= TOLERATED_ERROR[shape.quantization.scheme]


def confirm(  # noqa: PLR0913 - the last two only pass through, into the noun that tells all of an M
    shape: MoEShape,
    tokens: int,
    finalists: Sequence[R],
    incumbent: R,
    ask: Ask,
    *,
    rounds: int,
    tried: int,
    failures: Mapping[str, int],
) -> MeasuredChoice[R] | None:
    """A right finalist that led and beats the incumbent beyond doubt when they meet again, or the incumbent.

    A wrong incumbent gives way to the fastest right finalist. None where nothing that runs is right: nothing is known
    then that could be written down.
    """
    rivals = [pair for place, pair in enumerate(finalists) if pair not in (incumbent, *finalists[:place])]
    bout = _Comparison(shape, tokens, incumbent, rounds, ask, {})
    ranked = _rank(bout, rivals, data=0)
    chosen = _winner(bout, ranked) or _first_right(bout, ranked)
    error = None if chosen is None else _tolerable_error(bout, chosen.pair)
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
        throttled=chosen.raced.throttled is not None,
        sm_clock_mhz=chosen.raced.sm_clock_mhz,
    )


def _rank(bout: _Comparison[R], rivals: Sequence[R], data: int) -> list[_Verdict[R]]:
    """Who came to the end of a race, by gain over the incumbent, which is one of them where it runs."""
    heat = interleave(bout.tokens, bout.incumbent, rivals, bout.ask, rounds=bout.rounds, data=data)
    if heat.raced is None:
        return []
    incumbent_us = heat.incumbent.us if isinstance(heat.incumbent, ComparedLayer) else math.inf
    everyone = zip((bout.incumbent, *rivals), (heat.incumbent, *heat.rivals), strict=True)
    verdicts = [
        _Verdict(pair, entrant.us, incumbent_us, entrant.gain or _NEVER, heat.noise, heat.raced)
        for pair, entrant in everyone
        if isinstance(entrant, ComparedLayer)
    ]
    return sorted(verdicts, key=lambda verdict: (-verdict.gain.value, verdict.us))


def _winner(bout: _Comparison[R], ranked: Iterable[_Verdict[R]]) -> _Verdict[R] | None:
    """The first right one of those that led which beats the incumbent again, alone and on other data."""
    led = (one for one in ranked if one.noise is not None and one.gain.low > 1 and one.gain.value > 1 + LEAST_GAIN)
    right = (one for one in led if _tolerable_error(bout, one.pair) is not None)
    for one in itertools.islice(right, _MEETINGS):
        for again in _rank(bout, [one.pair], data=1):
            if again.pair == one.pair and _is_beyond_doubt(again):
                return again
        log.info("M=%d: %s led, but does not beat the incumbent alone", bout.tokens, describe(one.pair))
    return None


def _is_beyond_doubt(met: _Verdict[R]) -> bool:
    return met.noise is not None and met.gain.low > 1 and met.gain.value > 1 + max(LEAST_GAIN, met.noise)


def _first_right(bout: _Comparison[R], ranked: Sequence[_Verdict[R]]) -> _Verdict[R] | None:
    """The incumbent where it runs and is right, else the fastest that is."""
    order = sorted(ranked, key=lambda verdict: verdict.pair != bout.incumbent)
    return next((verdict for verdict in order if _tolerable_error(bout, verdict.pair) is not None), None)


def _tolerable_error(bout: _Comparison[R], pair: R) -> float | None:
    """The relative error of a pair that is right; None, with a warning the first time, of one that is not."""
    key = identity(pair)
    if key not in bout.errors:
        bout.errors[key] = _check(bout, pair)
    return bout.errors[key]


def _check(bout: _Comparison[R], pair: R) -> float | None:
    tokens, name = bout.tokens, describe(pair)
    answer = bout.ask(CheckAccuracy(tokens, pair))
    if isinstance(answer, Accuracy):
        if is_right(bout.shape, answer.error):
            return answer.error
        log.warning("M=%d: %s is WRONG (relative error %.3g): left out", tokens, name, answer.error)
    elif isinstance(answer, Failure):
        log.warning("M=%d: %s cannot be checked (%s: %s): left out", tokens, name, answer.kind, answer.message)
    else:
        raise TypeError(f"a Check was answered by {answer}")
    return None
