"""What torch leaves empty holds NaN while a result is checked, so that what a kernel forgets to write shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sglang_moe_ext.tuning.bench.nan_fill import NanFill

FLOATING = (torch.bfloat16, torch.float16, torch.float32)
MAKERS: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "empty": lambda dtype: torch.empty(3, 5, dtype=dtype),
    "empty of a tuple": lambda dtype: torch.empty((3, 5), dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(3, 5, dtype=dtype)),
    "empty_like of another dtype": lambda dtype: torch.empty_like(torch.zeros(3, 5, dtype=torch.int32), dtype=dtype),
    "empty_strided": lambda dtype: torch.empty_strided((3, 5), (5, 1), dtype=dtype),
    "new_empty": lambda dtype: torch.zeros(3, 5, dtype=dtype).new_empty(3, 5),
}


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_every_number_of_an_empty_tensor_is_nan(
    make: Callable[[torch.dtype], torch.Tensor], dtype: torch.dtype
) -> None:
    with NanFill():
        made = make(dtype)
    assert (made.dtype, tuple(made.shape), bool(made.isnan().all())) == (dtype, (3, 5), True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_whole_numbers_are_left_as_they_are(
    make: Callable[[torch.dtype], torch.Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = []
    monkeypatch.setattr(torch.Tensor, "fill_", lambda tensor, value: filled.append(tensor))
    with NanFill():
        assert make(dtype).dtype == dtype
    assert filled == []


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_outside_nothing_is_filled(
    make: Callable[[torch.dtype], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with NanFill():
        pass
    filled = []
    monkeypatch.setattr(torch.Tensor, "fill_", lambda tensor, value: filled.append(tensor))
    make(torch.float32)
    assert filled == []


def test_it_ends_where_a_kernel_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="refused"), NanFill():
        raise ValueError("refused")
    filled = []
    monkeypatch.setattr(torch.Tensor, "fill_", lambda tensor, value: filled.append(tensor))
    torch.empty(3)
    assert filled == []


def test_what_was_made_with_values_keeps_them() -> None:
    with NanFill():
        made = [torch.zeros(3), torch.ones(3), torch.full((3,), 2.0), torch.arange(3.0), torch.tensor([1.0, 2.0])]
    assert not any(bool(tensor.isnan().any()) for tensor in made)


def test_what_is_written_afterwards_stays() -> None:
    with NanFill():
        made = torch.empty(4)
        made[:3] = 1.0
    assert made.isnan().tolist() == [False, False, False, True]


def test_an_empty_tensor_of_no_element_is_no_error() -> None:
    with NanFill():
        assert torch.empty(0, 5).shape == (0, 5)
