"""What is timed of a served model: the prefill of one prompt, and decode steps of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DECODE_CONTEXT = 256
"""Tokens of each request before it decodes: 256 requests of it are prefilled at once, and no index of the engine's
operators passes 2**31, as with 512 tokens, 8 experts a token and a hidden size of 2,048 it just would."""
STEPS = 10
"""Decode steps of one run, each timed alone; the run counts as their median."""
WARM_UPS = 2


@dataclass(frozen=True, slots=True)
class Case:
    """`size`: tokens of the prompt, or requests of the batch."""

    kind: Literal["prefill", "decode"]
    size: int

    def __str__(self) -> str:
        return f"prefill of {self.size:,} tokens" if self.kind == "prefill" else f"decode at batch {self.size}"


CASES = (Case("prefill", 4096), Case("prefill", 16384), Case("decode", 1), Case("decode", 32), Case("decode", 256))


def decode_batches(cases: tuple[Case, ...] = CASES) -> list[int]:
    """For which the engine shall capture CUDA graphs."""
    return sorted({case.size for case in cases if case.kind == "decode"})


def most_tokens(runs: int, cases: tuple[Case, ...] = CASES) -> int:
    """That are in the KV cache at once in any case, when each is run so often."""
    of_a_request = DECODE_CONTEXT + STEPS * (runs + WARM_UPS + 1)
    return max(case.size if case.kind == "prefill" else case.size * of_a_request for case in cases)
