"""Launches after the first: by the binary that the first gave, unless the compiler would make another.

The kernel is a fake, since a real one launches on a GPU alone: `benchmarks.path_modes` runs ours there, twice and more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from sglang_moe_ext.kernels import launcher
from sglang_moe_ext.kernels.launcher import launch


class Binary:
    packed_metadata = ()

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.launched.append((grid, *arguments))


class Kernel:
    """As Triton's: `kernel[grid](**arguments)` compiles, launches, and gives the binary."""

    arg_names = ("a", "n", "BLOCK")

    def __init__(self, *, is_interpreted: bool = False) -> None:
        self.compiled: list[Binary | None] = []
        self._is_interpreted = is_interpreted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Binary | None]:
        def run(**_: Any) -> Binary | None:
            self.compiled.append(None if self._is_interpreted else Binary())
            return self.compiled[-1]

        return run


def arguments(a: Any = None, n: int = 16, block: int = 64, warps: int = 4) -> dict[str, Any]:
    return {"a": torch.zeros(16) if a is None else a, "n": n, "BLOCK": block, "num_warps": warps}


def test_a_second_launch_takes_the_binary_and_the_arguments_in_the_kernels_order() -> None:
    kernel, tensor = Kernel(), torch.zeros(16)
    for _ in range(2):
        launch(kernel, (3,), arguments(tensor))
    (binary,) = kernel.compiled
    assert binary is not None
    assert binary.launched == [((3, 1, 1), tensor, 16, 64)]


def test_another_tensor_of_the_same_kind_takes_the_same_binary() -> None:
    kernel, other = Kernel(), torch.ones(32)
    launch(kernel, (1,), arguments())
    launch(kernel, (1, 2), arguments(other))
    (binary,) = kernel.compiled
    assert binary is not None
    assert binary.launched == [((1, 2, 1), other, 16, 64)]


@pytest.mark.parametrize(
    "changed",
    [
        {"a": torch.zeros(16, dtype=torch.int32)},
        {"a": torch.zeros(17)[1:]},
        {"a": TensorDescriptor(torch.zeros(16, 16), [16, 16], [16, 1], [8, 16])},
        {"n": 17},
        {"block": 32},
        {"warps": 8},
    ],
    ids=["dtype", "not aligned", "descriptor", "number", "constant", "option"],
)
def test_what_the_compiler_may_tell_apart_is_compiled_anew(changed: dict[str, Any]) -> None:
    kernel = Kernel()
    launch(kernel, (1,), arguments())
    launch(kernel, (1,), arguments(**changed))
    assert len(kernel.compiled) == 2


def test_boxes_of_other_sizes_are_told_apart() -> None:
    kernel, tensor = Kernel(), torch.zeros(16, 16)
    for box in ([8, 16], [16, 16], [8, 16]):
        launch(kernel, (1,), arguments(TensorDescriptor(tensor, [16, 16], [16, 1], box)))
    assert len(kernel.compiled) == 2


def test_what_gives_no_binary_is_launched_the_same_way_again() -> None:
    kernel = Kernel(is_interpreted=True)
    for _ in range(2):
        launch(kernel, (1,), arguments())
    assert len(kernel.compiled) == 2


def test_many_binaries_are_forgotten_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_BINARIES_KEPT", 2)
    kernel = Kernel()
    for n in (1, 2, 3, 1):
        launch(kernel, (1,), arguments(n=n))
    assert len(kernel.compiled) == 4
