"""Child of test_quick_interpreter: the same small kernels in Triton's interpreter as it is, and quickened.

Last line of stdout: [answers as it is, answers quickened]; an answer is values, dtype and shape, or the error.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parent))
from interpreter import repair
from quick_interpreter import quicken

SIZE = 8


@triton.jit
def nested(x, y):
    return x * 2 + y


@triton.jit
def of_two_kernel(x_ptr, y_ptr, note, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    note(OPERATION(tl.load(x_ptr + at), tl.load(y_ptr + at)))


@triton.jit
def of_one_kernel(x_ptr, y_ptr, note, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    x, at = tl.load(x_ptr + tl.arange(0, SIZE)), tl.arange(0, 2)
    note(OPERATION(x, at, x_ptr, nested))


DTYPES = {
    name: getattr(torch, name)
    for name in ("bool", "int8", "uint8", "int32", "int64", "float16", "bfloat16", "float32", "float64")
}
OF_TWO: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: x / y,
    "//": lambda x, y: x // y,
    "%": lambda x, y: x % y,
    "<": lambda x, y: x < y,
    "&": lambda x, y: x & y,
    "<<": lambda x, y: x << y,
    "column + row": lambda x, y: x[:, None] + y[None, :],
    "row - column": lambda x, y: x[None, :] - y[:, None],
    "column < block": lambda x, y: x[:, None] < (x[:, None] + y[None, :]),
    "block & vector": lambda x, y: (x[:, None] == y[None, :]) & (y > 1),
    "nested": nested,
}
OF_ONE: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    **{f"x + {n!r}": lambda x, _, __, ___, n=n: x + n for n in (0, 1, 1.0, True, -1, 0.5, -0.0, 300, 1 << 40)},
    **{f"{n!r} - x": lambda x, _, __, ___, n=n: n - x for n in (1, 1.5, -1)},
    **{f"x * {n!r}": lambda x, _, __, ___, n=n: x * n for n in (2, 2.0, -2, float("inf"))},
    **{f"x / {n!r}": lambda x, _, __, ___, n=n: x / n for n in (2, 2.0)},
    **{f"x // {n!r}": lambda x, _, __, ___, n=n: x // n for n in (2, 2.0)},
    "x > 1": lambda x, *_: x > 1,
    "x & 1": lambda x, *_: x & 1,
    "shapes that do not fit": lambda x, at, *_: x + at,
    "blocks that do not fit": lambda x, at, *_: x[None, :] + at[None, :],
    "more dimensions": lambda x, at, *_: x + x[:, None],
    "pointer of int32": lambda _, at, pointer, __: pointer + at,
    "pointer of int64": lambda _, at, pointer, __: pointer + at.to(tl.int64),
    "pointers of a block": lambda _, at, pointer, __: pointer + at[:, None] * 2 + at[None, :],
    "pointer and a float": lambda _, at, pointer, __: pointer + at.to(tl.float32),
    "pointer and pointer": lambda _, at, pointer, __: (pointer + at) + (pointer + at),
    "pointer and number": lambda _, __, pointer, ___: pointer + 1,
    "times pointer": lambda _, at, pointer, __: at * pointer,
    "float8": lambda x, *_: x.to(tl.float32).to(tl.float8e4nv),
    "no type in common": lambda x, *_: x.to(tl.uint32) // x.to(tl.int32),
    "summed": lambda x, *_: tl.sum(x, 0) + 1,
    "largest": lambda x, *_: tl.maximum(x, 1.0),
    "where": lambda x, *_: tl.where(x > 1, x, 0.0),
    "nested": lambda x, _, __, nested: nested(x, 1),
    "nothing of a block": lambda x, *_: tl.zeros([], x.dtype),
}


def values(count: int, dtype: torch.dtype, start: int) -> torch.Tensor:
    return (torch.arange(start, start + count) % 5 + 1).to(dtype)


def answers() -> Iterator[Any]:
    for (x_name, x_dtype), (y_name, y_dtype) in itertools.product(DTYPES.items(), DTYPES.items()):
        for name, operation in OF_TWO.items():
            pair = values(SIZE, x_dtype, 0), values(SIZE, y_dtype, 2)
            yield f"{x_name} {name} {y_name}", answer(of_two_kernel, operation, pair)
    for (x_name, x_dtype), (name, operation) in itertools.product(DTYPES.items(), OF_ONE.items()):
        one = values(SIZE, x_dtype, 0)
        yield f"{x_name}: {name}", answer(of_one_kernel, operation, (one, one))


def answer(kernel: Any, operation: Callable[..., Any], tensors: tuple[torch.Tensor, torch.Tensor]) -> Any:
    noted: list[Any] = []
    try:
        kernel[(1,)](*tensors, noted.append, operation, SIZE=SIZE)
    except Exception as error:
        return str(error)
    (result,) = noted
    data = result.handle.data
    if "pointer" in str(result.dtype):
        data = data - tensors[0].data_ptr()
    sizes = [size.value for size in result.shape]
    return [data.tolist(), str(data.dtype), str(result.type), str(result.handle.dtype), sizes, result.numel.value]


def main() -> None:
    repair()
    plain = list(answers())
    quicken()
    print(json.dumps([plain, list(answers())]))


if __name__ == "__main__":
    main()
