"""What a launcher hands to Triton is noted, and launched again as it was, or with another argument or other tensors.

Triton compiles here and launches nothing: the binary that a launch runs stands for the launch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from sglang_moe_ext.core import Target
from sglang_moe_ext.kernels.compiled import TargetOnlyDriver
from sglang_moe_ext.kernels.launcher import RecordedLaunch, record_launch


@triton.jit
def scale(source, target, factor, count, BLOCK: tl.constexpr, ROUNDS: tl.constexpr = 2):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + places, mask=places < count)
    for _ in range(ROUNDS):
        values = values * factor
    tl.store(target + places, values, mask=places < count)


@dataclass
class NotingKernel:
    """A compiled kernel that notes how it is launched."""

    launched: list[tuple[tuple[int, ...], tuple[Any, ...]]] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.launched.append((grid, arguments))


def launch(kernel: object, **arguments: object) -> RecordedLaunch:
    return RecordedLaunch(kernel, (3, 1, 1), arguments)


def test_a_launch_hands_over_its_grid_and_its_arguments_in_their_order() -> None:
    kernel = NotingKernel()
    launch(kernel, b=1, a=2)()
    assert kernel.launched == [((3, 1, 1), (1, 2))]


def test_another_argument_stands_in_the_place_of_the_first() -> None:
    kernel = NotingKernel()
    launch(kernel, a=1, group=16, b=2).with_argument("group", 64)()
    assert kernel.launched == [((3, 1, 1), (1, 64, 2))]


def test_a_launch_with_another_argument_leaves_the_first_as_it_is() -> None:
    first = launch(NotingKernel(), group=16)
    first.with_argument("group", 64)
    assert first.arguments == {"group": 16}


def test_tensors_are_replaced_wherever_they_stand() -> None:
    old, new, other = torch.zeros(2), torch.ones(2), torch.zeros(2)
    kernel = NotingKernel()
    launch(kernel, a=old, b=other, c=old, n=4).with_tensors({id(old): new})()
    ((_, arguments),) = kernel.launched
    assert [id(argument) for argument in arguments[:3]] == [id(new), id(other), id(new)]


def test_an_equal_tensor_that_is_another_one_is_not_replaced() -> None:
    old, twin = torch.zeros(2), torch.zeros(2)
    kept = launch(NotingKernel(), a=twin).with_tensors({id(old): torch.ones(2)})
    assert kept.arguments["a"] is twin


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Launches compile for an H100 and run nothing."""
    run = JITFunction.run
    monkeypatch.setattr(triton.runtime.driver, "_active", TargetOnlyDriver(Target(90)))
    monkeypatch.setattr(scale, "device_caches", copy.copy(scale.device_caches))
    monkeypatch.setattr(
        JITFunction, "run", lambda self, *a, grid, warmup, **k: run(self, *a, grid=grid, warmup=True, **k)
    )
    yield


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(100, device="meta"), torch.empty(100, device="meta")


@pytest.mark.usefixtures("compiling")
def test_arguments_are_noted_by_name_however_they_are_given() -> None:
    source, target = tensors()
    with record_launch() as launches:
        scale[(7,)](source, target, count=100, factor=0.5, BLOCK=16, num_warps=2)
    (noted,) = launches
    assert list(noted.arguments) == ["source", "target", "factor", "count", "BLOCK", "ROUNDS"]
    assert noted.arguments["source"] is source and noted.arguments["target"] is target
    assert [noted.arguments[name] for name in ("factor", "count", "BLOCK", "ROUNDS")] == [0.5, 100, 16, 2]


@pytest.mark.usefixtures("compiling")
def test_what_is_noted_is_the_binary_of_the_launch() -> None:
    source, target = tensors()
    with record_launch() as launches:
        returned = scale[(7,)](source, target, 0.5, 100, BLOCK=16, num_warps=2)
    assert launches[0].kernel is returned
    assert returned.metadata.num_warps == 2


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize(
    ("grid", "size"),
    [((7,), (7, 1, 1)), ((7, 2), (7, 2, 1)), ((7, 2, 3), (7, 2, 3))],
    ids=str,
)
def test_a_grid_has_three_sizes(grid: tuple[int, ...], size: tuple[int, int, int]) -> None:
    with record_launch() as launches:
        scale[grid](*tensors(), 0.5, 100, BLOCK=16)
    assert launches[0].grid == size


@pytest.mark.usefixtures("compiling")
def test_a_grid_that_is_worked_out_from_the_arguments_is_noted_as_numbers() -> None:
    with record_launch() as launches:
        scale[lambda meta: (triton.cdiv(meta["count"], meta["BLOCK"]),)](*tensors(), 0.5, 100, BLOCK=16)
    assert launches[0].grid == (7, 1, 1)


@pytest.mark.usefixtures("compiling")
def test_launches_are_noted_in_their_order() -> None:
    with record_launch() as launches:
        for count in (100, 50):
            scale[(1,)](*tensors(), 0.5, count, BLOCK=16)
    assert [noted.arguments["count"] for noted in launches] == [100, 50]


@pytest.mark.usefixtures("compiling")
def test_outside_nothing_is_noted() -> None:
    with record_launch() as launches:
        pass
    scale[(1,)](*tensors(), 0.5, 100, BLOCK=16)
    assert launches == []


@pytest.mark.usefixtures("compiling")
def test_triton_is_as_it_was_where_a_launcher_raises() -> None:
    before = JITFunction.run
    with pytest.raises(ValueError, match="refused"), record_launch():
        raise ValueError("refused")
    assert JITFunction.run is before
