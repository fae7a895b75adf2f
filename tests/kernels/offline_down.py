"""Down projections without storage, and their kernels compiled for a GPU that need not be here."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from sglang_moe_ext.core import Quantization, Target
from sglang_moe_ext.kernels.compiled import TargetOnlyDriver, resources_of
from sglang_moe_ext.kernels.quantize import Scales

KINDS = {
    "bf16": (torch.bfloat16, Quantization()),
    "fp16": (torch.float16, Quantization()),
    "block": (torch.bfloat16, Quantization("fp8_w8a8", (128, 128))),
    "channel": (torch.bfloat16, Quantization("fp8_w8a8", per_channel=True)),
    "tensor": (torch.bfloat16, Quantization("fp8_w8a8")),
}
REGISTERS_MORE, SMEM_BYTES_MORE = 8, 1024
SMEM_PER_BLOCK = {90: 232_448, 100: 232_448, 120: 101_376}


def operands(
    kind: str, block_m: int, columns: int, k: int, *, rows: int = 8192, experts: int = 128
) -> tuple[tuple[Tensor, ...], Scales | None]:
    """What comes before the configuration in a launch of the down projection, and the scales."""
    dtype, quantization = KINDS[kind]
    stored = dtype if quantization.scheme is None else torch.float8_e4m3fn
    with torch.device("meta"):
        tensors = (
            torch.empty(rows, k, dtype=stored),
            torch.empty(experts, columns, k, dtype=stored),
            torch.empty(rows, columns, dtype=dtype),
            torch.empty(rows // block_m, dtype=torch.int32),
            torch.empty(1, dtype=torch.int32),
        )
        return tensors, _scales(quantization, rows, experts, columns, k)


def compiled(sm: int, kernel: Any, named: dict[str, Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", TargetOnlyDriver(Target(sm)))
        patch.setattr(kernel, "device_caches", copy.copy(kernel.device_caches))
        return kernel.warmup(**named, grid=(1,))


def waits_first(ptx: str) -> bool:
    """Whether a kernel waits for the one before it ahead of each of its loads and stores of global memory."""
    accesses = re.finditer(r"\b(?:ld|st|red|atom)\.(?:relaxed\.|volatile\.)?global|cp\.async|prefetch", ptx)
    return 0 < ptx.find("griddepcontrol.wait") < min(access.start() for access in accesses)


def check_needs(kernel: Any, sm: int, registers: int, smem_bytes: int) -> None:
    """A kernel fits, does not spill, and needs at most a little more than it did."""
    needs = resources_of(kernel)
    assert needs.spill_bytes == 0
    assert needs.registers <= registers + REGISTERS_MORE
    assert needs.smem_bytes <= min(smem_bytes + SMEM_BYTES_MORE, SMEM_PER_BLOCK[sm])


def _scales(quantization: Quantization, rows: int, experts: int, columns: int, k: int) -> Scales | None:
    if quantization.scheme is None:
        return None
    if quantization.block_shape is not None:
        return Scales(quantization, torch.empty(rows, k // 128), torch.empty(experts, columns // 128, k // 128))
    if quantization.per_channel:
        return Scales(quantization, torch.empty(rows, 1), torch.empty(experts, columns, 1))
    return Scales(quantization, torch.empty(1), torch.empty(experts))
