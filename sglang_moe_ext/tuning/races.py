"""Race whole layers against an incumbent: all that can, again where the GPU slowed down; one failure stops no other."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sglang_moe_ext.core import Failure
from sglang_moe_ext.tuning.questions import Ask, Race, Raced, Runner, named
from sglang_moe_ext.tuning.statistics import Interval, gain, typical_us

log = logging.getLogger(__name__)

_REPETITIONS = 2
"""Of a race in which the GPU slowed down."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """A pair that came to the end of the race.

    `samples`: microseconds of each round, `us`: what is typical of them; `gain`: over the incumbent, None where that
    is not in the race.
    """

    samples: tuple[float, ...]
    us: float
    gain: Interval | None


@dataclass(frozen=True, slots=True)
class Heat:
    """What became of everyone; `incumbent` is None where there is none, and the rivals stand in the order given.

    `noise`: by how much the incumbent differs from itself, None where it is not in the race. `raced`: the race that the
    times are from, None where none came to its end.
    """

    incumbent: Entrant | Failure | None
    rivals: tuple[Entrant | Failure, ...]
    noise: float | None
    raced: Raced | None


@dataclass(frozen=True, slots=True)
class _Card:
    """Who is to race, by place; place 0 is the incumbent's, and empty where there is none."""

    tokens: int
    starters: dict[int, Runner]
    rounds: int
    data: int

    def race(self, places: Sequence[int]) -> Race:
        """The incumbent comes first and last, which says how much it differs from itself."""
        entered = [*places, 0] if 0 in places else places
        return Race(self.tokens, tuple(self.starters[place] for place in entered), self.rounds, data=self.data)


def heat(
    tokens: int, incumbent: Runner | None, rivals: Sequence[Runner], ask: Ask, *, rounds: int, data: int = 0
) -> Heat:
    """One race of all; where it fails, of those that run alone; then of the incumbent and ever fewer of them."""
    starters = {place: pair for place, pair in enumerate((incumbent, *rivals)) if pair is not None}
    card = _Card(tokens, starters, rounds, data)
    field, out = list(starters), dict[int, Failure]()
    answer = _raced(card.race(field), ask) if field else None
    if isinstance(answer, Failure):
        log.warning("M=%d: the race failed (%s: %s): trying one by one", tokens, answer.kind, answer.message)
        out = _failing_alone(card, ask)
        if out:
            field = [place for place in field if place not in out]
            answer = _raced(card.race(field), ask) if field else None
    while isinstance(answer, Failure):
        field, cut = _halved(field)
        log.warning("M=%d: the race of those that run alone failed (%s): %d left", tokens, answer.kind, len(field))
        out |= dict.fromkeys(cut, _crowded(answer))
        answer = _raced(card.race(field), ask) if field else None
    found, noise = ({}, None) if answer is None else _entrants(field, answer)
    everyone: dict[int, Entrant | Failure] = {**out, **found}
    places = range(1, len(rivals) + 1)
    return Heat(everyone.get(0), tuple(everyone[place] for place in places), noise, answer)


def _failing_alone(card: _Card, ask: Ask) -> dict[int, Failure]:
    """Those that fail in a round of their own."""
    found: dict[int, Failure] = {}
    for place, pair in card.starters.items():
        answer = ask(Race(card.tokens, (pair,), rounds=1, data=card.data))
        if isinstance(answer, Failure):
            found[place] = answer
            log.warning("M=%d: %s fails: %s: %s", card.tokens, named(pair), answer.kind, answer.message)
    return found


def _halved(field: Sequence[int]) -> tuple[list[int], list[int]]:
    """(who stays: the incumbent and the first half of its rivals, or of all where it is out; who is cut)."""
    stay = (len(field) - 1) // 2 + 1 if field[0] == 0 and len(field) > 1 else len(field) // 2
    return list(field[:stay]), list(field[stay:])


def _crowded(why: Failure) -> Failure:
    return Failure(why.kind, f"runs alone, but not in a race with the others: {why.message}")


def _raced(race: Race, ask: Ask, repetitions: int = _REPETITIONS) -> Raced | Failure:
    """The answer to a race, which is run again where the GPU slowed down meanwhile."""
    match ask(race):
        case Raced(throttled=str(why)) if repetitions:
            log.info("M=%d: the GPU slowed down in the race (%s): racing again", race.tokens, why)
            return _raced(replace(race, attempt=race.attempt + 1), ask, repetitions - 1)
        case Raced(throttled=str(why)) as answer:
            log.warning("M=%d: the GPU slows down in every race (%s): taken as it is", race.tokens, why)
            return answer
        case Raced() | Failure() as answer:
            return answer
        case answer:
            raise TypeError(f"a Race was answered by {answer}")


def _entrants(field: Iterable[int], raced: Raced) -> tuple[dict[int, Entrant], float | None]:
    """What the times say, and the noise; those of an incumbent are the first and the last."""
    turns = raced.routings
    if 0 not in field:
        alone = {place: Entrant(us, typical_us(us, turns), None) for place, us in zip(field, raced.us, strict=True)}
        return alone, None
    first, *times, again = raced.us
    mean = tuple((one + other) / 2 for one, other in zip(first, again, strict=True))
    found = {0: Entrant(mean, typical_us(mean, turns), Interval(1.0, 1.0, 1.0))}
    for place, us in zip((place for place in field if place), times, strict=True):
        found[place] = Entrant(us, typical_us(us, turns), gain(mean, us, turns))
    differs = gain(first, again, turns).value
    return found, max(differs, 1 / differs) - 1
