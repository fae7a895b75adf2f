"""Triton's interpreter without the work it repeats: the same operations, the same checks, the same results.

Triton 3.7.1 replaces all functions of its language at each call of a nested function, makes the same shapes, types and
table of dtypes anew for each value, and computes five operations for each of integers, to drop whether it overflowed
(`device_assert` looks at it under `debug` alone): three quarters of the time of a kernel.
"""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction


def quicken() -> None:
    """Replace these; call it once, before any kernel runs. Does nothing for a Triton that is built otherwise."""
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    InterpretedFunction.__call__ = _call
    tl.tensor.__init__ = _make_tensor
    tl.block_type.with_element_ty = _with_element_ty
    TritonSemantic.binary_op_sanitize_overflow_impl = _checked(TritonSemantic.binary_op_sanitize_overflow_impl)


def _remembered(original: Any) -> Any:
    known: dict[str, Any] = {}

    def np_dtype(dtype: Any) -> Any:
        if isinstance(dtype, (tl.block_type, tl.pointer_type)):
            return original(dtype)
        if dtype.name not in known:
            known[dtype.name] = original(dtype)
        return known[dtype.name]

    return np_dtype


def _make_tensor(self: Any, handle: Any, type: Any) -> None:  # noqa: A002 - Triton's name
    """See `tl.tensor.__init__`."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shape(*type.shape) if type.is_block() else _shape()


@functools.cache
def _shape(*sizes: int) -> tuple[Any, Any]:
    """As a tensor has it, and how many elements that are."""
    return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))


def _with_element_ty(self: Any, element_ty: Any) -> Any:
    """See `tl.block_type.with_element_ty`; not for pointers, which are as many as there are tensors."""
    if element_ty.is_ptr():
        return tl.block_type(element_ty, self.shape)
    return _block_type(element_ty, *self.shape)


@functools.cache
def _block_type(element_ty: Any, *sizes: int) -> Any:
    return tl.block_type(element_ty, list(sizes))


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A call from another kernel, which has replaced the language already: see `InterpretedFunction.__call__`."""
    if not all(_is_replaced(module) for module in _languages(self.fn)):
        interpreter._patch_lang(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def _is_replaced(module: Any) -> bool:
    return not (tl.core.is_builtin(module.load) or tl.core.is_builtin(tl.tensor.__add__))


@functools.cache
def _languages(function: Any) -> tuple[Any, ...]:
    """What `_patch_lang` would replace for it."""
    modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
    return tuple(module for module in modules if module in (tl, tl.core))


def _checked(original: Any) -> Any:
    def check(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        if self.builder.options.debug:
            original(self, lhs, rhs, operation)

    return check
