"""Race the finalists of one M against its incumbent: one that is right, and faster beyond doubt, takes its place."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sglang_moe_ext.core import Failure, MoEShape, Scheme
from sglang_moe_ext.tuning.questions import Ask, Check, Checked, Pair, Race, Raced
from sglang_moe_ext.tuning.statistics import Interval, gain, typical_us

log = logging.getLogger(__name__)

LEAST_GAIN = 0.01
"""The incumbent stays unless it is beaten by more than this, and by more than it differs from itself."""
TOLERATED_ERROR: dict[Scheme | None, float] = {
    None: 1e-2,
    "int8_w8a16": 1e-2,
    "int4_w4a16": 1e-2,
    "fp8_w8a8": 5e-2,
    "int8_w8a8": 5e-2,
}
"""Relative error of the whole layer against float32 that a right result stays under: 2e-3 seen for bf16, 6e-3 for fp8
(H200). The reference takes quantised weights as they are stored, so they add nothing; eight-bit activations of the down
GEMM are quantised from what the up GEMM rounded otherwise than the reference."""
_REPETITIONS = 2
"""Of a race in which the GPU slowed down."""
_NEVER = Interval(math.inf, math.inf, math.inf)
"""The gain over what does not run: it would take for ever."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was chosen for one M. Times in microseconds, of the whole layer, from one race.

    Of an incumbent that cannot run, `incumbent_us` and `gain` are infinite, and `noise` is None; else it is by how much
    the incumbent differs from itself. `tried` and `failures`: candidates of the screening, and kinds of failure there.
    """

    pair: Pair
    us: float
    incumbent: Pair
    incumbent_us: float
    gain: Interval
    noise: float | None
    error: float
    tried: int
    failures: Mapping[str, int]
    throttled: bool
    sm_clock_mhz: int | None


@dataclass(frozen=True, slots=True)
class _Entrant:
    """A pair after the race; `gain` is over the incumbent."""

    pair: Pair
    us: float
    gain: Interval


@dataclass(frozen=True, slots=True)
class _Result:
    """A race that came to its end; `incumbent` is None, and so is `noise`, where it cannot run."""

    incumbent: _Entrant | None
    rivals: list[_Entrant]
    noise: float | None
    raced: Raced


def rematch(  # noqa: PLR0913 - the last two only pass through, into the noun that tells all of an M
    shape: MoEShape,
    tokens: int,
    finalists: Sequence[Pair],
    incumbent: Pair,
    ask: Ask,
    *,
    rounds: int,
    tried: int,
    failures: Mapping[str, int],
) -> Measured | None:
    """The right finalist with the highest gain, or the incumbent where none beats it beyond doubt.

    A wrong incumbent gives way to any right finalist. None where nothing that runs is right: nothing is known then that
    could be written down.
    """
    rivals = [pair for place, pair in enumerate(finalists) if pair not in (incumbent, *finalists[:place])]
    result = _raced(tokens, incumbent, rivals, rounds, ask)
    chosen = None if result is None else _first_right(shape, tokens, result, ask)
    if result is None or chosen is None:
        return None
    entrant, error = chosen
    return Measured(
        pair=entrant.pair,
        us=entrant.us,
        incumbent=incumbent,
        incumbent_us=math.inf if result.incumbent is None else result.incumbent.us,
        gain=entrant.gain,
        noise=result.noise,
        error=error,
        tried=tried,
        failures=failures,
        throttled=result.raced.throttled is not None,
        sm_clock_mhz=result.raced.sm_clock_mhz,
    )


def _first_right(shape: MoEShape, tokens: int, result: _Result, ask: Ask) -> tuple[_Entrant, float] | None:
    for entrant in _in_order_of_choice(result):
        error = _tolerable_error(shape, tokens, entrant.pair, ask)
        if error is not None:
            return entrant, error
    log.warning("M=%d: left out: nothing that runs there gave a right result", tokens)
    return None


def _in_order_of_choice(result: _Result) -> list[_Entrant]:
    """Who beats the incumbent beyond doubt, by gain; the incumbent; who is left to take the place of a wrong one."""
    ranked = sorted(result.rivals, key=lambda entrant: (-entrant.gain.value, entrant.us))
    needed = 1 + max(LEAST_GAIN, result.noise or 0.0)
    better = [entrant for entrant in ranked if entrant.gain.low > 1 and entrant.gain.value > needed]
    stays = () if result.incumbent is None else (result.incumbent,)
    return [*better, *stays, *(entrant for entrant in ranked if entrant not in better)]


def _tolerable_error(shape: MoEShape, tokens: int, pair: Pair, ask: Ask) -> float | None:
    """The relative error of a pair that is right; None, with a warning, of one that is not."""
    name = _named(pair)
    match ask(Check(tokens, pair)):
        case Checked(error) if error <= TOLERATED_ERROR[shape.quantisation.scheme]:
            return error
        case Checked(error):
            log.warning("M=%d: %s is WRONG (relative error %.3g): left out", tokens, name, error)
        case Failure(kind, message):
            log.warning("M=%d: %s cannot be checked (%s: %s): left out", tokens, name, kind, message)
        case answer:
            raise TypeError(f"a Check was answered by {answer}")
    return None


def _raced(tokens: int, incumbent: Pair, rivals: Sequence[Pair], rounds: int, ask: Ask) -> _Result | None:
    """One race of all, or of those that run where one breaks it; None where there is none."""
    answer = _race(Race(tokens, (incumbent, *rivals, incumbent), rounds), ask)
    if isinstance(answer, Raced):
        return _compared(incumbent, rivals, answer)
    log.warning("M=%d: the race failed (%s: %s): racing one by one", tokens, answer.kind, answer.message)
    running = [pair for pair in (incumbent, *rivals) if _runs(Race(tokens, (pair,), rounds), ask)]
    rivals = [pair for pair in running if pair != incumbent]
    entered = tuple(running) if incumbent not in running else (incumbent, *rivals, incumbent)
    answer = _race(Race(tokens, entered, rounds, attempt=_REPETITIONS + 1), ask) if running else answer
    if isinstance(answer, Raced):
        return _compared(incumbent if incumbent in running else None, rivals, answer)
    log.warning("M=%d: left out: nothing is left that can race (%s: %s)", tokens, answer.kind, answer.message)
    return None


def _runs(race: Race, ask: Ask) -> bool:
    answer = ask(race)
    if isinstance(answer, Failure):
        log.warning("M=%d: %s fails: %s: %s", race.tokens, _named(race.pairs[0]), answer.kind, answer.message)
    return not isinstance(answer, Failure)


def _race(race: Race, ask: Ask, repetitions: int = _REPETITIONS) -> Raced | Failure:
    """The answer to a race, which is run again where the GPU slowed down meanwhile."""
    answer = ask(race)
    match answer:
        case Raced(throttled=str(why)) if repetitions:
            log.info("M=%d: the GPU slowed down in the race (%s): racing again", race.tokens, why)
            return _race(replace(race, attempt=race.attempt + 1), ask, repetitions - 1)
        case Raced(throttled=str(why)):
            log.warning("M=%d: the GPU slows down in every race (%s): taken as it is", race.tokens, why)
            return answer
        case Raced() | Failure():
            return answer
        case _:
            raise TypeError(f"a Race was answered by {answer}")


def _compared(incumbent: Pair | None, rivals: Sequence[Pair], raced: Raced) -> _Result:
    """What the times say; of an incumbent that took part, they are the first and the last."""
    turns = raced.routings
    if incumbent is None:
        alone = [_Entrant(pair, typical_us(us, turns), _NEVER) for pair, us in zip(rivals, raced.us, strict=True)]
        return _Result(None, alone, None, raced)
    first, *times, again = raced.us
    mean = [(one + other) / 2 for one, other in zip(first, again, strict=True)]
    entrants = [
        _Entrant(pair, typical_us(us, turns), gain(mean, us, turns)) for pair, us in zip(rivals, times, strict=True)
    ]
    differs = gain(first, again, turns).value
    stays = _Entrant(incumbent, typical_us(mean, turns), Interval(1.0, 1.0, 1.0))
    return _Result(stays, entrants, max(differs, 1 / differs) - 1, raced)


def _named(pair: Pair) -> str:
    return f"up {pair['up']}, down {pair['down']}"
