"""Triton's interpreter without the work it repeats: the same operations, the same checks, the same results.

Triton 3.7.1 replaces all functions of its language at each call of a nested function, makes the same shapes, types and
table of dtypes anew for each value, and computes five operations for each of integers, to drop whether it overflowed
(`device_assert` looks at it under `debug` alone): three quarters of the time of a kernel. Half of the rest goes into
types: which one two operands have in common, and whether their shapes are equal, by objects made for each question.
"""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle

MOST_NUMBERS = 4096
"""So many are remembered as tensors."""


def quicken() -> None:
    """Replace these; call it once, before any kernel runs. Does nothing for a Triton that is built otherwise."""
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    InterpretedFunction.__call__ = _call
    tl.tensor.__init__ = _make_tensor
    tl.block_type.__init__ = _make_block_type
    tl.block_type.with_element_ty = _with_element_ty
    tl.block_type.to_ir = _to_ir
    TritonSemantic.binary_op_sanitize_overflow_impl = _checked(TritonSemantic.binary_op_sanitize_overflow_impl)
    TritonSemantic.binary_op_type_checking_impl = _of_one_type(TritonSemantic.binary_op_type_checking_impl)
    TritonSemantic.computation_type_impl = _remembered_type(TritonSemantic.computation_type_impl)
    TritonSemantic.broadcast_impl_value = _of_one_shape(TritonSemantic.broadcast_impl_value)
    TritonSemantic.cast = _cast_if_other(TritonSemantic.cast)
    TensorHandle.__post_init__ = _checked_size(TensorHandle.__post_init__)
    tl.core._unwrap_if_constexpr = _unwrapped(tl.core._unwrap_if_constexpr)
    interpreter._patch_builtin = _patch_builtin
    for package in (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base):
        _replaced(package)


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
    self.shape, self.numel = _shape(*type.shape.values) if type.is_block() else _shape()


@functools.cache
def _shape(*sizes: int) -> tuple[Any, Any]:
    """As a tensor has it, and how many elements that are."""
    return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))


def _make_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """See `tl.block_type.__init__`."""
    assert isinstance(shape, (list, tl.tuple))
    self.element_ty = element_ty
    self.shape, self.numel, of_shape = _block_shape(*tl.core._unwrap_if_constexpr(list(shape)))
    self.name = f"<{of_shape}, {element_ty}>"


@functools.cache
def _block_shape(*sizes: int) -> tuple[Any, int, str]:
    """As a block type has it, how many elements that are, and its name."""
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    shape = tl.tuple(list(sizes))
    return shape, tl.core.validate_block_shape(shape), str(shape)


def _to_ir(self: Any, builder: Any) -> Any:
    """The interpreter's block types are those of the language; see `tl.block_type.to_ir`."""
    self.element_ty.to_ir(builder)
    return self


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


def _of_one_type(original: Any) -> Any:
    """Find the common type by name alone, and make the tensor of a number once for each type that stands before it."""
    known: dict[Any, tuple[Any, Any]] = {}

    def check(
        self: Any,
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> tuple[Any, Any]:
        asked = (allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)
        if type(lhs) is not tl.tensor:
            return original(self, lhs, rhs, *asked)
        if type(rhs) is tl.tensor:
            if type(rhs.dtype) is not tl.dtype:  # a pointer's type is of a subclass
                return original(self, lhs, rhs, *asked)
            if type(lhs.dtype) is not tl.dtype:
                moves_pointer = allow_lhs_ptr and rhs.dtype.is_int()
                return self.broadcast_impl_value(lhs, rhs) if moves_pointer else original(self, lhs, rhs, *asked)
            if arithmetic_check:
                common = self.computation_type_impl(lhs.dtype, False, rhs.dtype, False, div_or_mod)
                lhs, rhs = self.cast(lhs, common), self.cast(rhs, common)
            return self.broadcast_impl_value(lhs, rhs)
        if type(lhs.dtype) is not tl.dtype or type(rhs) not in (int, float) or not arithmetic_check:
            return original(self, lhs, rhs, *asked)
        key = (lhs.type.name, type(rhs), rhs, div_or_mod)
        if key not in known:
            if len(known) >= MOST_NUMBERS:
                known.clear()
            made, number = original(self, lhs, rhs, *asked)
            number.handle.data.flags.writeable = False
            known[key] = made.dtype, number
        dtype, number = known[key]
        return self.cast(lhs, dtype), number

    return check


def _remembered_type(original: Any) -> Any:
    known: dict[Any, Any] = {}

    def common(self: Any, a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, div_or_mod: bool) -> Any:
        key = (a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod)
        if key not in known:
            known[key] = original(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return known[key]

    return common


def _of_one_shape(original: Any) -> Any:
    """Shapes are compared as lists of numbers, where two blocks have as many dimensions."""

    def broadcast(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        if not (lhs.type.is_block() and rhs.type.is_block()):
            return original(self, lhs, rhs) if lhs.type.is_block() or rhs.type.is_block() else (lhs, rhs)
        left, right = lhs.type.shape.values, rhs.type.shape.values
        if left == right:
            return lhs, rhs
        if len(left) != len(right) or any(1 != size != other != 1 for size, other in zip(left, right, strict=True)):
            return original(self, lhs, rhs)
        sizes = [other if size == 1 else size for size, other in zip(left, right, strict=True)]
        return _widened(self, lhs, sizes), _widened(self, rhs, sizes)

    return broadcast


def _widened(semantic: Any, operand: Any, sizes: list[int]) -> Any:
    if operand.type.shape.values == sizes:
        return operand
    wide = semantic.builder.create_broadcast(operand.handle, sizes)
    return semantic.tensor(wide, tl.block_type(operand.type.scalar, sizes))


def _cast_if_other(original: Any) -> Any:
    def cast(self: Any, operand: Any, dtype: Any, *rounding: Any, **named: Any) -> Any:
        return operand if operand.type.scalar is dtype.scalar else original(self, operand, dtype, *rounding, **named)

    return cast


def _checked_size(original: Any) -> Any:
    def check(self: Any) -> None:
        if type(self.dtype) is not tl.dtype or self.data.itemsize * 8 > self.dtype.primitive_bitwidth:
            original(self)

    return check


def _unwrapped(original: Any) -> Any:
    plain = (tl.tensor, int, bool, float, type(None), tl.dtype, str)

    def unwrap(value: Any) -> Any:
        return value if type(value) in plain else original(value)

    return unwrap


@functools.cache
def _replaced(package: Any) -> dict[str, tuple[Any, Any]]:
    members = inspect.getmembers(package, tl.core.is_builtin)
    return {name: (member, _with_semantic(member)) for name, member in members}


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """See `interpreter._patch_builtin`; what takes the place of a function is made once."""
    for name, (member, replaced) in _replaced(package).items():
        if getattr(package, name) is member:
            scope.set_attr(package, name, replaced)


def _with_semantic(member: Any) -> Any:
    """See `interpreter._patch_attr`; without the check that a function was given what is given to it here."""
    is_wrapped = member.__code__.co_qualname == "builtin.<locals>.wrapper"
    function = member.__wrapped__ if is_wrapped else member

    def replaced(*args: Any, **named: Any) -> Any:
        named["_semantic"] = interpreter.interpreter_semantic
        return function(*args, **named)

    return replaced
