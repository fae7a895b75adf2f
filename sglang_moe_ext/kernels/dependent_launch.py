"""Programmatic dependent launch (sm_90 and newer): a kernel is set up while the one before it ends.

The kernels of a sorted layer form a chain. Each lets the next one start as soon as all its own programs run, and waits
for the end of the one before it ahead of its first load or store. Since each waits, what any earlier kernel of the
chain wrote is visible, and what it read may be overwritten. Other kernels, the engine's among them, are launched as
ever: they start when all before them have ended. So is `swiglu`'s kernel of rows: a wait in each of its programs, one
for each row, took it from 106 to 182 us (Qwen3-30B-A3B, M=16384, H200, Triton 3.6.0, 2026-11-27, kernel_plans).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_moe_ext.few_tokens_config import FIRST_PDL_SM

OPTIONS: dict[str, Any] = {"launch_pdl": True}
"""What the compiler has to know of a kernel that waits."""


def is_available(sm: int) -> bool:
    """Whether GPU and Triton have programmatic dependent launch."""
    return sm >= FIRST_PDL_SM and hasattr(tl.extra, "cuda") and hasattr(tl.extra.cuda, "gdc_wait")


def is_used(tensor: Tensor) -> bool:
    """Whether kernels on that tensor's device form a chain."""
    return tensor.is_cuda and is_available(_sm(tensor.device))


def options(dependent: bool) -> dict[str, Any]:
    """The arguments of a Triton kernel that calls `let_next_start` and `wait_for_last`."""
    return {"DEPENDENT": True, **OPTIONS} if dependent else {"DEPENDENT": False}


@lru_cache
def _sm(device: torch.device) -> int:
    if torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@triton.jit  # type: ignore[untyped-decorator]
def let_next_start(DEPENDENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The next kernel may be set up once all programs of this one have come here."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit  # type: ignore[untyped-decorator]
def wait_for_last(DEPENDENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return when the kernel before this one has ended and what it wrote is visible."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
