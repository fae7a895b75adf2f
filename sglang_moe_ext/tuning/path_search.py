"""Our own path against what was chosen of the engine's kernels, at one M: a function over `ask`, without a GPU."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable, Mapping
from typing import cast

from sglang_moe_ext.core import Failure, MoEShape, TileConfig
from sglang_moe_ext.sorted_path import SortedPath
from sglang_moe_ext.tuning import path_space, rematch
from sglang_moe_ext.tuning.questions import Ask, Pair, Runner, Screened, ScreenPath
from sglang_moe_ext.tuning.rematch import Measured

log = logging.getLogger(__name__)

_SAMPLES = 4
_FINALISTS = 3


def raced(
    shape: MoEShape, tokens: int, chosen: Pair, engines_ups: Iterable[TileConfig], ask: Ask, *, rounds: int
) -> Measured[Runner] | None:
    """The path that beats the chosen pair beyond doubt, or the pair; None where no path can be tried."""
    if why := path_space.why_not(shape, tokens):
        log.info("M=%d: our own path is not tried: %s", tokens, why)
        return None
    times, failures = screened(shape, tokens, [chosen["up"], *engines_ups], ask)
    best: list[Runner] = [*sorted(times, key=times.__getitem__)[:_FINALISTS]]
    tried, incumbent = len(times) + sum(failures.values()), cast("Runner", chosen)
    return rematch.rematch(shape, tokens, best, incumbent, ask, rounds=rounds, tried=tried, failures=failures)


def screened(
    shape: MoEShape, tokens: int, engines_ups: Iterable[TileConfig], ask: Ask
) -> tuple[dict[SortedPath, float], Mapping[str, int]]:
    """Microseconds of the layer: each up with the first down of its blocks, then the best of each with every down."""
    times: dict[SortedPath, float] = {}
    failures: dict[str, int] = {}

    def runs(path: SortedPath) -> bool:
        answer = ask(ScreenPath(tokens, path, _SAMPLES))
        if isinstance(answer, Screened):
            times[path] = statistics.median(answer.us[0])
        elif isinstance(answer, Failure):
            failures[answer.kind] = failures.get(answer.kind, 0) + 1
            log.info("M=%d: %s cannot run: %s", tokens, path, answer.message)
        else:
            raise TypeError(f"a ScreenPath was answered by {answer}")
        return path in times

    downs = {block_m: path_space.downs(shape, block_m) for block_m in path_space.BLOCKS_M}
    for up in path_space.ups(shape, engines_ups):
        of_block = downs[up.block_m]
        # Until one runs, it may be the down tile that is too large for this GPU.
        while not runs(SortedPath(up, of_block[0])) and len(of_block) > 1 and not _any_of(times, up.block_m):
            of_block.pop(0)
    for block_m, of_block in downs.items():
        if timed := _any_of(times, block_m):
            best = min(timed, key=times.__getitem__)
            for down in of_block[1:]:
                runs(SortedPath(best.up, down))
    return times, failures


def _any_of(times: Iterable[SortedPath], block_m: int) -> list[SortedPath]:
    return [path for path in times if path.block_m == block_m]
