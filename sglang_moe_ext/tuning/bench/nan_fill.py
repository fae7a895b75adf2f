"""Fill with NaN what torch leaves empty: what a kernel forgets to write, and then reads or returns, shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_EMPTY = (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty)
_HOLD_NAN = (torch.bfloat16, torch.float16, torch.float32)


class NanFill(TorchFunctionMode):
    """Within, tensors that are made empty by Python code hold NaN."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _EMPTY and made.dtype in _HOLD_NAN:
            made.fill_(float("nan"))
        return made
