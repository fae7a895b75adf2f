"""Note what a launcher hands to Triton, and launch that again for a twentieth of the launcher's own time.

A launcher written in Python checks, computes grids and looks binaries up, 0.1 ms and more each time; a search that
launches one binary many times needs that once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a compiled kernel: its grid, and its arguments by name, constants included."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: Mapping[str, Any]

    def __call__(self) -> None:
        """Launch it on the current stream."""
        self.kernel[self.grid](*self.arguments.values())

    def with_argument(self, name: str, value: object) -> Launch:
        """The same launch with another value of one argument, of the same type."""
        return replace(self, arguments={**self.arguments, name: value})

    def with_tensors(self, replaced: Mapping[int, Any]) -> Launch:
        """The same launch with other tensors: by the id() of each that is to be replaced."""
        return replace(self, arguments={name: replaced.get(id(value), value) for name, value in self.arguments.items()})


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within, each launch of a Triton kernel takes place, and is noted in the list."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    run = JITFunction.run

    def run_and_note(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        own = {name: value for name, value in named.items() if name in self.signature.parameters}
        bound = self.signature.bind(*arguments, **own)
        bound.apply_defaults()
        kernel = run(self, *arguments, grid=grid, warmup=warmup, **named)
        size = tuple(grid(bound.arguments) if callable(grid) else grid)
        launches.append(Launch(kernel, (*size, 1, 1)[:3], dict(bound.arguments)))
        return kernel

    JITFunction.run = run_and_note
    try:
        yield launches
    finally:
        JITFunction.run = run
