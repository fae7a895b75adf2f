"""Ray for a machine without it, as far as upstream's tuning scripts use it: one process, one GPU, calls made at once.

Put `benchmarks/ray_stand_in` first on PYTHONPATH; nothing else should see it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Result:
    """What a remote call gives back: here its value is known at once."""

    value: Any


@dataclass(frozen=True, slots=True)
class Remote:
    """Something that is called by `.remote(...)`."""

    call: Callable[..., Any]

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


class Actor:
    """An object whose methods are called by `.remote(...)`, and answer a Result."""

    def __init__(self, inner: object) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Remote:
        method = getattr(self._inner, name)
        return Remote(lambda *args, **kwargs: Result(method(*args, **kwargs)))


def init(*_: object, **__: object) -> None:
    """Nothing is to be started."""


def available_resources() -> dict[str, float]:
    return {"GPU": 1.0}


def get_gpu_ids() -> list[int]:
    """The ordinal of the one GPU among the visible ones."""
    return [0]


def remote(**_: object) -> Callable[[type], Remote]:
    """`remote(num_gpus=1)(Class)`: a class whose objects are actors; what it asks for is there."""
    return lambda of: Remote(lambda *args, **kwargs: Actor(of(*args, **kwargs)))


def get(results: Any) -> Any:
    """The value of a Result, or the values of a list of them."""
    return [result.value for result in results] if isinstance(results, list) else results.value
