"""The tokens that a server answers with, and how far those of two servers agree."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.e2e.client import prompt
from sglang_moe_ext.untrusted import show

ANSWER_S = 90.0
LONG, SHORT = 1024, (5, 17, 33, 64, 90, 128, 200)
"""Tokens of prompts: a long one runs a kernel plan, the others the engine's kernel with our table."""
LEAST_EQUAL = 0.9
"""Share of first tokens that must be equal where nothing says how far another tile alone changes them.

Both servers compute in 16 bits, each right within the error of its dtype (`schemes.py`): where the two likeliest
tokens lie closer than that, either is a right answer, and what follows a different token differs as well.
"""
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of the answers of two servers to the same prompts.

    `first_tokens`, `tokens`: shares that are equal; behind a different token of an answer, none counts as equal.
    `first_difference`: the request and the token of its answer.
    """

    first_tokens: float
    tokens: float
    first_difference: tuple[int, int] | None

    def __str__(self) -> str:
        where = (
            "none differs" if self.first_difference is None else "request {}, token {}".format(*self.first_difference)
        )
        return f"{self.first_tokens:.0%} of first, {self.tokens:.0%} of all ({where})"

    def document(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def prompts(vocabulary: int, lengths: Sequence[int]) -> list[list[int]]:
    """One prompt of each length, the same in each run."""
    return [prompt(length, f"real servers {number}", vocabulary) for number, length in enumerate(lengths)]


def lengths_of(requests: int, longs: int) -> list[int]:
    """So many lengths; the first `longs` of them LONG."""
    return [LONG if number < longs else SHORT[number % len(SHORT)] for number in range(requests)]


def generate(url: str, body: Mapping[str, Any], path: str = "/generate", timeout_s: float = ANSWER_S) -> Any:
    """What the server answers to that request.

    Raises:
        EngineError: it refuses, or does not answer in time.
    """
    data = json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with _NO_PROXY.open(request, timeout=timeout_s) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        said = error.read(300) if isinstance(error, urllib.request.HTTPError) else b""
        raise EngineError(f"the server did not answer: {show(error)} {show(said.decode(errors='replace'))}") from error


def greedy(
    url: str,
    asked: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    seconds: float,
    more: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """The likeliest tokens of an SGLang server, one request after the other: two servers run the same batches.

    `more`: further fields of each request.

    Raises:
        EngineError: a request fails, or the time is over.
    """
    until = time.monotonic() + seconds
    found: list[list[int]] = []
    for ids in asked:
        left_s = until - time.monotonic()
        if left_s <= 0:
            raise EngineError(f"{len(found)} of {len(asked)} requests were answered within {seconds:.0f} s")
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        body = {"input_ids": list(ids), "sampling_params": sampling, **(more or {})}
        answer = generate(url, body, timeout_s=min(ANSWER_S, left_s))
        found.append(_ids(answer))
    return found


def _ids(answer: Any) -> list[int]:
    ids = answer.get("output_ids") if isinstance(answer, dict) else None
    if not isinstance(ids, list) or not all(type(it) is int for it in ids):
        raise EngineError(f"the server answered {show(answer, 200)}, expected output_ids")
    return ids


def compare(stock: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> Agreement:
    """Raises EngineError where an answer is shorter than the other's."""
    if not stock or [len(it) for it in stock] != [len(it) for it in other]:
        raise EngineError("the two servers answered with different numbers of tokens")
    equal = [
        next((at for at, (one, two) in enumerate(zip(a, b, strict=True)) if one != two), len(a))
        for a, b in zip(stock, other, strict=True)
    ]
    first = next(((number, at) for number, at in enumerate(equal) if at < len(stock[number])), None)
    whole = sum(map(len, stock))
    return Agreement(sum(at > 0 for at in equal) / len(stock), sum(equal) / whole, first)


def is_equal_enough(found: Agreement, control: Agreement | None) -> bool:
    """Whether answers agree as far as those of stock with another tile do, and at least by LEAST_EQUAL without one."""
    least = LEAST_EQUAL if control is None else min(LEAST_EQUAL, control.first_tokens - 0.1)
    return found.first_tokens >= least
