"""Triton's interpreter with its narrow floats repaired: bfloat16 and float8 count, and round, as a GPU does it.

The interpreter of Triton 3.7.1 keeps bfloat16 in uint16 and float8 in uint8 arrays. It multiplies and adds the bits of
bfloat16 as if they were integers, cuts float32 off to bfloat16, and loses carries towards float8. Here every such value
becomes float32 first, and torch rounds the results.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

TORCH_DTYPE = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
BITS = {2: (np.int16, torch.int16), 1: (np.uint8, torch.uint8)}


def repair() -> None:
    """Replace the four builder methods that get narrow floats wrong; call it once, before any kernel runs."""
    original_cast, original_binary = InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op
    original_convert = InterpreterBuilder.create_fp_to_fp

    def dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, imprecise: Any) -> TensorHandle:
        product = np.matmul(_wide(a), _wide(b), dtype=acc.data.dtype)
        return TensorHandle(product + acc.data, acc.dtype.scalar)

    def cast(self: Any, source: Any, target: Any) -> TensorHandle:
        if not (_is_narrow(source.dtype) or _is_narrow(target)):
            return original_cast(self, source, target)
        wide = TensorHandle(_wide(source).astype(np.float32), tl.float32)
        return _narrowed(wide.data, target.scalar) if _is_narrow(target) else original_cast(self, wide, target)

    def convert(self: Any, source: Any, target: Any, rounding: Any) -> TensorHandle:
        to_nearest = rounding is None or rounding == rounding.RTNE
        return cast(self, source, target) if to_nearest else original_convert(self, source, target, rounding)

    def binary(self: Any, left: Any, right: Any, operation: Any) -> TensorHandle:
        if not (_is_narrow(left.dtype) and _is_narrow(right.dtype)):
            return original_binary(self, left, right, operation)
        result = operation(_wide(left), _wide(right))
        return TensorHandle(result, tl.int1) if result.dtype == bool else _narrowed(result, left.dtype.scalar)

    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = convert
    InterpreterBuilder.binary_op = binary


def _is_narrow(dtype: Any) -> bool:
    return dtype.scalar in TORCH_DTYPE


def _wide(handle: Any) -> np.ndarray:
    """float32 where the array holds patterns or halves; anything else as it is."""
    if handle.dtype.scalar == tl.float16:
        return handle.data.astype(np.float32)
    if not _is_narrow(handle.dtype):
        return handle.data
    bits = np.ascontiguousarray(handle.data).view(BITS[handle.data.itemsize][0])
    return torch.from_numpy(bits).view(TORCH_DTYPE[handle.dtype.scalar]).float().numpy()


def _narrowed(values: np.ndarray, dtype: Any) -> TensorHandle:
    """Nearest even; float8 saturates, as the conversions of a GPU do."""
    target = TORCH_DTYPE[dtype]
    wide = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    if target.itemsize == 1:
        largest = torch.finfo(target).max
        wide = wide.clamp(-largest, largest)
    bits = wide.to(target).view(BITS[target.itemsize][1]).numpy()
    return TensorHandle(bits.view(np.uint16 if target.itemsize == 2 else np.uint8), dtype)
