"""Launch a Triton kernel: the first time through its just-in-time compiler, later the compiled binary directly.

A sorted layer takes four or five launches. The compiler inspects every argument at each of them, which costs the host
more than the launch itself. The direct launch is Triton's own: `binary[grid](*arguments)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_BINARIES_KEPT = 16384
"""Each number of tokens of each layer has a few, which are one where the compiler makes one of them."""

_binaries: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
    """`arguments`: every one of the kernel, and the compiler's options, always in one order."""
    key = (kernel, *map(_told_apart, arguments.values()))
    binary = _binaries.get(key)
    if binary is not None:
        binary[(*grid, 1, 1)[:3]](*[arguments[name] for name in kernel.arg_names])
        return
    binary = kernel[grid](**arguments)
    if hasattr(binary, "packed_metadata"):  # the interpreter gives none
        if len(_binaries) >= _BINARIES_KEPT:
            _binaries.clear()
        _binaries[key] = binary


def _told_apart(value: Any) -> Any:
    """At least what the compiler tells apart: of a number its value, of a tensor dtype, device and alignment."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0, value.device.index
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, *value.block_shape
    return value


@dataclass(frozen=True, slots=True)
class RecordedLaunch:
    """One launch of a compiled kernel: its grid, and its arguments by name, constants included."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: Mapping[str, Any]

    def __call__(self) -> None:
        """Launch it on the current stream."""
        self.kernel[self.grid](*self.arguments.values())

    def with_argument(self, name: str, value: object) -> RecordedLaunch:
        """The same launch with another value of one argument, of the same type."""
        return replace(self, arguments={**self.arguments, name: value})

    def with_tensors(self, replaced: Mapping[int, Any]) -> RecordedLaunch:
        """The same launch with other tensors: by the id() of each that is to be replaced."""
        return replace(self, arguments={name: replaced.get(id(value), value) for name, value in self.arguments.items()})


@contextmanager
def record_launch() -> Iterator[list[RecordedLaunch]]:
    """Within, each launch of a Triton kernel takes place, and is noted in the list."""
    from triton.runtime.jit import JITFunction

    launches: list[RecordedLaunch] = []
    run = JITFunction.run

    def run_and_note(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        own = {name: value for name, value in named.items() if name in self.signature.parameters}
        bound = self.signature.bind(*arguments, **own)
        bound.apply_defaults()
        kernel = run(self, *arguments, grid=grid, warmup=warmup, **named)
        size = tuple(grid(bound.arguments) if callable(grid) else grid)
        launches.append(RecordedLaunch(kernel, (*size, 1, 1)[:3], dict(bound.arguments)))
        return kernel

    JITFunction.run = run_and_note
    try:
        yield launches
    finally:
        JITFunction.run = run
