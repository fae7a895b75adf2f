"""An engine's kernels with GROUP_SIZE_M as an argument: one binary for what would be one for each group.

GROUP_SIZE_M is a constant of the kernels and decides nothing but the order of the programs. Registers, shared
memory and main loop are the same without it (tests/engines/test_any_group.py). For child processes only.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

GROUP = "GROUP_SIZE_M"
_KERNELS = ("fused_moe_kernel", "fused_moe_kernel_gptq_awq")
"""Of SGLang and of vLLM, which share their origin."""


@functools.cache
def _taking_group(kernel: Any) -> Any:
    """The same Triton function, with the same source, for which the group is not a constant."""
    import triton

    fn = kernel.fn
    twin = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    twin.__kwdefaults__, twin.__qualname__, twin.__module__ = fn.__kwdefaults__, fn.__qualname__, fn.__module__
    twin.__annotations__ = {name: kind for name, kind in fn.__annotations__.items() if name != GROUP}
    return triton.jit(twin, do_not_specialize=[*(kernel.do_not_specialize or ()), GROUP])


@contextmanager
def any_group(kernels: Any) -> Iterator[None]:
    """Within, the engine's launcher runs the kernels of that module with the group as an argument."""
    own = {name: getattr(kernels, name) for name in _KERNELS}
    for name, kernel in own.items():
        setattr(kernels, name, _taking_group(kernel))
    try:
        yield
    finally:
        for name, kernel in own.items():
            setattr(kernels, name, kernel)


def forget_binaries(kernels: Any) -> None:
    """Drop what Triton keeps in memory of each binary: thousands of them would take gigabytes."""
    for name in _KERNELS:
        kernel = getattr(kernels, name)
        for each in (kernel, _taking_group(kernel)):
            each.device_caches.clear()
