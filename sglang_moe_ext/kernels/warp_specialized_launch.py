"""Host side of the warp-specialized kernels: cached descriptors, a cached direct launch, grid sizes, checks.

A launch costs the host one dictionary lookup and Triton's own `binary[grid](*arguments)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sglang_moe_ext.core import MoEExtError

BLOCK = 128
"""Rows of a tile, rows of a block of the sort, and the side of a block of float8 scales."""
LEAST_SCALE = 1e-10
"""Largest magnitude of a group of zeros: no scale is zero. As in the engine's quantization."""
LARGEST_FP8 = 448.0
"""Of float8_e4m3fn."""
_TMA_BYTES = 16
_DESCRIPTORS_KEPT = 8192
_BINARIES_KEPT = 16384


@dataclass(frozen=True, slots=True)
class _Address:
    """The parts of a tensor that a descriptor reads. A kept descriptor keeps no tensor alive."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


_descriptors: dict[tuple[Any, ...], TensorDescriptor] = {}
_binaries: dict[tuple[Any, ...], Any] = {}


def box(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """TMA descriptor of a 2D tensor in boxes [rows, columns], made once per address, shape and box.

    Raises: MoEExtError where TMA cannot move the tensor.
    """
    key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), rows, columns)
    found = _descriptors.get(key)
    if found is not None:
        return found
    size = tensor.element_size()
    if tensor.stride(1) != 1 or tensor.stride(0) * size % _TMA_BYTES or tensor.data_ptr() % _TMA_BYTES:
        raise MoEExtError(
            f"TMA cannot move a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} of {size} bytes: "
            f"expected contiguous rows of whole {_TMA_BYTES} bytes, aligned to {_TMA_BYTES}"
        )
    if len(_descriptors) >= _DESCRIPTORS_KEPT:
        _descriptors.clear()
    layout = NVMMASharedLayout(swizzle_byte_width=min(128, columns * size), element_bitwidth=8 * size, rank=2)
    address = _Address(tensor.data_ptr(), tensor.dtype)
    made = TensorDescriptor(address, list(tensor.shape), list(tensor.stride()), [rows, columns], layout)
    _descriptors[key] = made
    return made


def launch(kernel: Any, programs: int, arguments: Mapping[str, Any]) -> None:
    """Run `kernel` on a grid of `programs`. `arguments`: all of the kernel and the compiler's options, in one order."""
    key = (kernel, *map(_specialization, arguments.values()))
    binary = _binaries.get(key)
    if binary is not None:
        binary[(programs, 1, 1)](*[arguments[name] for name in kernel.arg_names])
        return
    binary = kernel[(programs,)](**arguments)
    if len(_binaries) >= _BINARIES_KEPT:
        _binaries.clear()
    _binaries[key] = binary


def _specialization(value: Any) -> Any:
    """At least what the compiler tells apart: of an integer its value, of a tensor dtype, device and alignment."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % _TMA_BYTES == 0, value.device.index
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, *value.block_shape
    return value


def programs(device: torch.device, tiles: int, per_multiprocessor: int = 1) -> int:
    """Size of a persistent grid: one program per tile, at most those that run at once."""
    return max(1, min(tiles, _multiprocessors(device) * per_multiprocessor))


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def scheme_of(weights: Tensor, weight_scale: Tensor | None) -> str:
    """ "none", "block" (128 x 128) or "channel", read from the shape of `weight_scale`.

    Raises: MoEExtError for any other scheme.
    """
    experts, rows, k = weights.shape
    if weight_scale is None:
        if weights.dtype in (torch.bfloat16, torch.float16):
            return "none"
    elif weights.dtype == torch.float8_e4m3fn and weight_scale.dtype == torch.float32:
        shape = tuple(weight_scale.shape)
        if shape == (experts, -(-rows // BLOCK), k // BLOCK):
            return "block"
        if shape == (experts, rows, 1):
            return "channel"
    raise MoEExtError(
        f"weights {tuple(weights.shape)} {weights.dtype} with scales "
        f"{None if weight_scale is None else (tuple(weight_scale.shape), weight_scale.dtype)}: the warp-specialized "
        "kernels take 16 bits, or float8_e4m3fn with float32 scales [E, N / 128, K / 128] or [E, N, 1]"
    )


def strides(scale: Tensor | None, dimensions: int) -> tuple[int, ...]:
    """Strides of a scale; zeros without one."""
    return (0,) * dimensions if scale is None else scale.stride()
