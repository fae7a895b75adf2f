"""Launch a kernel: first through Triton's just-in-time compiler, from then on the binary that this gave, directly.

A layer of ours is four or five launches, and what the compiler asks of each argument, again at each of them, costs the
host more than the launch. The direct one is Triton's own: `binary[grid](*arguments)`.
"""

from __future__ import annotations

from collections.abc import Mapping
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
