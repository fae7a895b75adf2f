"""What upstream's tuning script takes for all its configurations, from what it said while it ran over some of them."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.vs_upstream.timed_run import Run
from sglang_moe_ext.core import EngineError

_ANNOUNCED = re.compile(r"Start tuning over (\d+) configurations")
_PROGRESS = re.compile(r"\|\s*(\d+)/(\d+) \[")
_TOOK = re.compile(r"Tuning took ([\d.]+) seconds")


@dataclass(frozen=True, slots=True)
class Effort:
    """`seconds` for all of `whole` configurations, extrapolated where it `tried` fewer; `ran_s`: as long as it ran."""

    seconds: float
    tried: int
    whole: int
    ran_s: float

    @property
    def is_extrapolated(self) -> bool:
        return self.tried < self.whole


@dataclass(frozen=True, slots=True)
class _Done:
    """So many configurations were done after so many seconds."""

    count: int
    at_s: float


def sample(space: Sequence[dict[str, int]], every: int) -> list[dict[str, int]]:
    """One of `every` configurations, drawn at random: each N-th in their own order would have the same GROUP_SIZE_M.

    Shuffled, since a script that is stopped must not have seen the small tiles alone.
    """
    shuffled = list(space)
    random.Random(0).shuffle(shuffled)
    return shuffled[::every]


def of(run: Run, whole: int) -> Effort:
    """What the whole space takes: start-up and end once, and the mean time of a configuration after the first.

    Raises:
        EngineError: the script failed, or was stopped before its first configuration was done.
    """
    if run.status:
        raise EngineError(f"upstream's script failed with exit status {run.status}: {run.last_words}")
    start, *progress = _progress(run)
    if run.status == 0 and start.count == whole:
        return Effort(run.seconds, whole, whole, run.seconds)
    if run.status is None and not progress:
        raise EngineError(
            f"upstream's script was stopped after {run.seconds:.0f} s, before its first configuration was done: "
            "give it more --seconds"
        )
    first, last = _stretch(run, start, progress)
    each_s = (last.at_s - first.at_s) / (last.count - first.count)
    end_s = 0.0 if run.status is None else run.seconds - last.at_s
    seconds = first.at_s + each_s * (whole - first.count) + end_s
    return Effort(seconds, start.count if run.status == 0 else last.count, whole, run.seconds)


def _stretch(run: Run, start: _Done, progress: Sequence[_Done]) -> tuple[_Done, _Done]:
    """From the first configuration to the last one; from the start where no more was heard."""
    if progress and progress[0].count < progress[-1].count:
        return progress[0], progress[-1]
    last = progress[-1] if run.status is None else _Done(start.count, start.at_s + _took(run, start))
    return _Done(0, start.at_s), last


def _progress(run: Run) -> list[_Done]:
    """First how many there are and when it started with them, then how many were done when."""
    found: list[_Done] = []
    for line in run.lines:
        if announced := _ANNOUNCED.search(line.text):
            found = [_Done(int(announced[1]), line.at_s)]
        for done, of_all in _PROGRESS.findall(line.text):
            if found and int(of_all) == found[0].count and int(done):
                found.append(_Done(int(done), line.at_s))
    if not found and run.status is not None:
        raise EngineError(f"upstream's script did not say how many configurations it tries: {run.last_words}")
    return found or [_Done(0, run.seconds)]


def _took(run: Run, start: _Done) -> float:
    """Seconds that it tuned, where no progress was heard."""
    took = next((match for line in run.lines if (match := _TOOK.search(line.text))), None)
    return float(took[1]) if took else run.seconds - start.at_s
