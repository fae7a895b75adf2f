"""Race what is given beside what the engine takes today, as whole layers, and check each; nothing is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sglang_moe_ext.core import Failure, TileConfig
from sglang_moe_ext.tuning import races
from sglang_moe_ext.tuning.questions import Ask, Check, Checked, Pair
from sglang_moe_ext.tuning.statistics import Interval

TODAY = "today"
"""The name of what the engine takes now."""

Trouble = Callable[[Pair], Failure | None]
"""What is known against a pair before it runs; waits for its binaries."""
_Configs = tuple[TileConfig, TileConfig]
"""A pair as a key."""


@dataclass(frozen=True, slots=True)
class Timed:
    """`us`: of the whole layer; `gain`: over today's choice, None where that cannot run; `error`: relative."""

    us: float
    gain: Interval | None
    error: float | Failure


@dataclass(frozen=True, slots=True)
class Compared:
    """Each choice at one M, today's first.

    `noise`: by how much today's differs from itself, None where it cannot run; `throttled`: why the GPU slowed down in
    every race, None where it did not.
    """

    pairs: Mapping[str, Pair]
    results: Mapping[str, Timed | Failure]
    noise: float | None
    throttled: str | None


def compared(
    tokens: int, today: Pair, given: Mapping[str, Pair], trouble: Trouble, ask: Ask, *, rounds: int
) -> Compared:
    """All choices in one race, and a check of each that runs; one that cannot run costs itself alone."""
    pairs = {TODAY: today, **given}
    found = {configs: trouble(_pair(configs)) for configs in map(_configs, pairs.values())}
    results: dict[_Configs, Timed | Failure] = {configs: why for configs, why in found.items() if why is not None}
    first, *others = found
    rivals = [configs for configs in others if configs not in results]
    incumbent = None if first in results else today
    heat = races.heat(tokens, incumbent, list(map(_pair, rivals)), ask, rounds=rounds)
    for configs, result in zip((first, *rivals), (heat.incumbent, *heat.rivals), strict=True):
        match result:
            case races.Entrant(_, us, over_today):
                results[configs] = Timed(us, over_today, _error(Check(tokens, _pair(configs)), ask))
            case Failure():
                results[configs] = result
    return Compared(
        pairs=pairs,
        results={name: results[_configs(pair)] for name, pair in pairs.items()},
        noise=heat.noise,
        throttled=None if heat.raced is None else heat.raced.throttled,
    )


def _configs(pair: Pair) -> _Configs:
    return pair["up"], pair["down"]


def _pair(configs: _Configs) -> Pair:
    up, down = configs
    return {"up": up, "down": down}


def _error(check: Check, ask: Ask) -> float | Failure:
    match ask(check):
        case Checked(error):
            return error
        case Failure() as why:
            return why
        case answer:
            raise TypeError(f"a Check was answered by {answer}")
