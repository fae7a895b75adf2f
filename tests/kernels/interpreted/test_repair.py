"""The repaired interpreter rounds and multiplies narrow floats as torch does."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def convert_kernel(source_ptr, target_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(target_ptr + at, tl.load(source_ptr + at).to(target_ptr.dtype.element_ty))


@triton.jit
def multiply_and_add_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, tl.where(x < y, x * y, x + y))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


NARROW = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_float32_is_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    source = torch.randn(4096)
    target = torch.empty(4096, dtype=dtype)
    convert_kernel[(1,)](source, target, SIZE=4096)
    assert torch.equal(target.float(), source.to(dtype).float())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_widening_to_float32_loses_nothing(dtype: torch.dtype) -> None:
    source = torch.randn(4096).to(dtype)
    target = torch.empty(4096)
    convert_kernel[(1,)](source, target, SIZE=4096)
    assert torch.equal(target, source.float())


def test_float8_saturates() -> None:
    target = torch.empty(2, dtype=torch.float8_e4m3fn)
    convert_kernel[(1,)](torch.tensor([1e6, -1e6]), target, SIZE=2)
    assert target.float().tolist() == [448.0, -448.0]


def test_bfloat16_arithmetic_is_arithmetic() -> None:
    x, y = torch.randn(256).bfloat16(), torch.randn(256).bfloat16()
    out = torch.empty(256, dtype=torch.bfloat16)
    multiply_and_add_kernel[(1,)](x, y, out, SIZE=256)
    assert torch.equal(out, torch.where(x < y, x * y, x + y))


@pytest.mark.parametrize("dtype", [*NARROW, torch.int8], ids=str)
def test_dot_multiplies_values_and_not_patterns(dtype: torch.dtype) -> None:
    a, b = (torch.randn(32, 32) * 8).to(dtype), (torch.randn(32, 32) * 8).to(dtype)
    out = torch.empty(32, 32, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    dot_kernel[(1,)](a, b, out, SIZE=32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)


@triton.jit
def twice(x):
    return x + x


@triton.jit
def add_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, twice(tl.load(x_ptr + at)) - tl.max(tl.load(x_ptr + at), 0))


def test_nested_functions_compute_with_integers() -> None:
    out = torch.empty(4, dtype=torch.int32)
    add_kernel[(1,)](torch.tensor([1, -2, 3, 1 << 29], dtype=torch.int32), out, SIZE=4)
    assert out.tolist() == [2 - (1 << 29), -4 - (1 << 29), 6 - (1 << 29), 1 << 29]
