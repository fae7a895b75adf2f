"""What one server gives: the time to the first token by prompt length, and tokens a second by batch size."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.e2e.client import Client
from sglang_moe_ext.engines.server_log import Said

Kind = Literal["stock", "plugin"]
Progress = Callable[[str, int, int], None]
WARM_UPS = 2
"""Before the prompts that count: the first may compile."""


@dataclass(frozen=True, slots=True)
class Cases:
    """What is asked of each server. `prompts` of each input length, one after the other, with one new token each.

    Each of `batches` is sent `runs` times, with prompts of `decode_input` tokens and answers of `decode_output`.
    """

    input_lengths: tuple[int, ...]
    prompts: int
    batches: tuple[int, ...]
    runs: int
    decode_input: int
    decode_output: int
    seed: int


@dataclass(frozen=True, slots=True)
class Sample:
    """The mean of so many values, and their standard deviation; `values` where they are known one by one."""

    mean: float
    deviation: float
    count: int
    values: tuple[float, ...] = ()


def sample(values: Sequence[float]) -> Sample:
    """Of values that were measured one by one."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return Sample(statistics.fmean(values), deviation, len(values), tuple(values))


def pool(samples: Sequence[Sample]) -> Sample | None:
    """All of them as one; None of none."""
    count = sum(one.count for one in samples)
    if not count:
        return None
    mean = sum(one.mean * one.count for one in samples) / count
    squares = sum(one.deviation**2 * (one.count - 1) + one.count * (one.mean - mean) ** 2 for one in samples)
    values = tuple(value for one in samples for value in one.values)
    return Sample(mean, math.sqrt(squares / (count - 1)) if count > 1 else 0.0, count, values)


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """Prompts of one length, one after the other: milliseconds to the first token, and requests a second."""

    ttft_ms: Sample
    requests_per_s: float


class Measurer(Protocol):
    """A client that measures one case of one server. `visit`: how often that server was measured before."""

    def first_tokens(self, tokens: int, cases: Cases, visit: int) -> FirstTokens:
        """Raises EngineError where the server fails."""

    def decode(self, batch: int, cases: Cases, visit: int) -> Sample:
        """Generated tokens a second. Raises EngineError where the server fails."""


@dataclass(frozen=True, slots=True)
class OwnMeasurer:
    """By our own client. The same prompts for every server, and others at each visit, as a cache may know them."""

    client: Client

    def first_tokens(self, tokens: int, cases: Cases, visit: int) -> FirstTokens:
        for number in range(WARM_UPS):
            self.client.first_token(tokens, f"{cases.seed} {visit} warm {number}")
        taken = [self.client.first_token(tokens, f"{cases.seed} {visit} {number}") for number in range(cases.prompts)]
        return FirstTokens(sample([it.ms for it in taken]), cases.prompts / sum(it.whole_ms for it in taken) * 1e3)

    def decode(self, batch: int, cases: Cases, visit: int) -> Sample:
        rates = [
            self.client.batch(
                batch, cases.decode_input, cases.decode_output, f"{cases.seed} {visit} {run}"
            ).tokens_per_s
            for run in range(cases.runs + 1)
        ]
        return sample(rates[1:])


@dataclass(slots=True)
class Turn:
    """What one server gave in its turn, filled while it is measured; `failure`: why there is no more."""

    kind: Kind
    start_s: float | None = None
    first_tokens: dict[int, FirstTokens] = field(default_factory=dict)
    decode: dict[int, Sample] = field(default_factory=dict)
    said: Said | None = None
    failure: str | None = None

    @property
    def wrongly_attached(self) -> str | None:
        """What is wrong where stock has the plugin, or the plugin's server has not; None where no log was read."""
        if self.said is None or self.said.is_active == (self.kind == "plugin"):
            return None
        state = "is" if self.said.is_active else "is not"
        return f"by the log of the {self.kind} server the plugin {state} active"


def measure(measurer: Measurer, turn: Turn, cases: Cases, visit: int, progress: Progress, stage: str) -> None:
    """All cases in order; the first that fails ends the turn, and is told by `turn.failure`."""
    of = len(cases.input_lengths) + len(cases.batches)
    done = 0
    progress(stage, done, of)
    try:
        for tokens in cases.input_lengths:
            turn.first_tokens[tokens] = measurer.first_tokens(tokens, cases, visit)
            progress(stage, done := done + 1, of)
        for batch in cases.batches:
            turn.decode[batch] = measurer.decode(batch, cases, visit)
            progress(stage, done := done + 1, of)
    except EngineError as error:
        turn.failure = str(error)
