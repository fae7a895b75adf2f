"""What a function of upstream's names among its constants: how a copy of it is recognised."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any

_ARCHITECTURE = "ForCausalLM"


def strings_of(function: Callable[..., Any]) -> frozenset[str]:
    """All strings among the constants of the function, however deep: `in [...]` is compiled to a tuple."""
    found: set[str] = set()
    waiting: list[object] = [getattr(inspect.unwrap(function), "__code__", None)]
    while waiting:
        match waiting.pop():
            case str() as text:
                found.add(text)
            case tuple() | frozenset() as several:
                waiting.extend(several)
            case CodeType() as code:
                waiting.extend(code.co_consts)
    return frozenset(found)


def names_architectures(stated: frozenset[str]) -> bool:
    """Whether one of them is the name of a model's class, which another function of that name would not have."""
    return any(text.endswith(_ARCHITECTURE) for text in stated)


def in_one_line(error: Exception) -> str:
    """The error's class, and the first line of its message."""
    first, *_ = str(error).splitlines() or ["no message"]
    return f"{type(error).__name__}: {first}"
