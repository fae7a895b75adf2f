"""SGLang's sort of a batch's tokens, put off until it is known whether anything will read it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

PARTS = 3
"""sorted_token_ids, expert_ids, num_tokens_post_padded."""


@dataclass(slots=True)
class DeferredSort:
    """One call of the engine's `moe_align_block_size` that has not been made yet."""

    sort: Callable[[], tuple[Any, ...]]
    sorted: tuple[Any, ...] | None = None

    def parts(self) -> tuple[SortPart, ...]:
        """What stands for its results until they are needed."""
        return tuple(SortPart(self, at) for at in range(PARTS))


@dataclass(frozen=True, slots=True)
class SortPart:
    """In the place of one result."""

    of: DeferredSort
    at: int

    def value(self) -> Any:
        """The result itself; the first of them that is asked for sorts."""
        if self.of.sorted is None:
            self.of.sorted = self.of.sort()
        return self.of.sorted[self.at]


_FIRST, _FIRST_NAME = 5, "sorted_token_ids"
"""Of the results, among the arguments of the sequence of kernels."""


def is_put_off(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of the sequence of kernels has something in the place of the sort's results."""
    return isinstance(args[_FIRST] if len(args) > _FIRST else kwargs.get(_FIRST_NAME), SortPart)


def sort_now(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the results of the sort in the places of what stood for them."""
    return tuple(map(_value, args)), {name: _value(value) for name, value in kwargs.items()}


def _value(argument: Any) -> Any:
    return argument.value() if isinstance(argument, SortPart) else argument


@dataclass(slots=True)
class NextSort:
    """Whether the next sort of this thread is put off: the engine sorts straight behind the lookup that decides it.

    `was_put_off`: whether one ever was, in any thread; else there is nothing that a lookup has to take back.
    """

    was_put_off: bool = False
    _of_thread: threading.local = field(default_factory=threading.local)

    def decide(self, *, is_deferred: bool) -> None:
        """Called by a lookup: by each once one was put off."""
        self.was_put_off = self.was_put_off or is_deferred
        self._of_thread.is_deferred = is_deferred

    def take(self) -> bool:
        """What was decided; it is for one sort alone."""
        is_deferred = getattr(self._of_thread, "is_deferred", False)
        self._of_thread.is_deferred = False
        return is_deferred
