"""TMA operands of the sorted kernels: checks, descriptors, strides, and the grid of a persistent launch.

TMA needs rows of a multiple of 16 bytes (8 columns of 16 bits, 16 of float8), storage aligned to 16 bytes and a
contiguous last dimension. Descriptors are made on the host: on the device they would need an allocator.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sglang_moe_ext.core import MoEExtError, Quantization
from sglang_moe_ext.kernel_plans import DownConfig, UpConfig

TMA_BYTES = 16
WIDEST_BOX = 256
"""Most elements along one side of a TMA box."""
BLACKWELL = (10, 0)
DESCRIPTORS_KEPT = 8192
"""Enough for 128 layers with 32 boxes each and the intermediate tensors. One descriptor is about 1 KB."""


def scaling_of(quantization: Quantization) -> str:
    """What one scale covers: none, block, channel or tensor.

    Raises:
        MoEExtError: these kernels do not support the scheme.
    """
    if quantization.scheme is None:
        return "none"
    if quantization.scheme != "fp8_w8a8":
        raise MoEExtError(f"the sorted down projection cannot do {quantization}: give it 16 bits or fp8_w8a8")
    if quantization.is_block_wise:
        return "block"
    return "channel" if quantization.per_channel else "tensor"


def scale_strides(a_scale: Tensor | None, b_scale: Tensor | None) -> dict[str, int]:
    """Strides of scales [rows, groups] and [experts, columns, groups]; 0 along a missing dimension."""
    names = ("stride_asm", "stride_ask", "stride_bse", "stride_bsn", "stride_bsk")
    return dict(zip(names, (*_padded(a_scale, 2), *_padded(b_scale, 3)), strict=True))


def _padded(scale: Tensor | None, dimensions: int) -> tuple[int, ...]:
    strides = () if scale is None else scale.stride()
    return (*strides, *(0,) * (dimensions - len(strides)))


def check_tensors(a: Tensor, weights: Tensor, out: Tensor) -> None:
    """Raises MoEExtError if the shapes do not fit together or TMA cannot move one of the tensors."""
    if a.shape[1] != weights.shape[2] or tuple(out.shape) != (a.shape[0], weights.shape[1]):
        raise MoEExtError(
            f"shapes a {tuple(a.shape)}, weights {tuple(weights.shape)}, out {tuple(out.shape)} do not fit together: "
            "expected [rows, K], [experts, N, K], [rows, N]"
        )
    for name, tensor in (("a", a), ("weights", weights), ("out", out)):
        size = tensor.element_size()
        whole = all(stride * size % TMA_BYTES == 0 for stride in tensor.stride()[:-1])
        if tensor.stride(-1) != 1 or not whole or tensor.data_ptr() % TMA_BYTES:
            raise MoEExtError(
                f"TMA cannot move `{name}` with strides {tensor.stride()} of {size} bytes: it needs rows of whole "
                f"{TMA_BYTES} bytes, contiguous inside; take the engine's kernel here"
            )


def check_tile(
    tile: tuple[int, int, int],
    k: int,
    align_block_m: int,
    quantization: Quantization,
    device: torch.device,
    *,
    groups_of_columns: int,
) -> None:
    """Check a tile (m, n, k) against the alignment, TMA and the scales.

    Args:
        groups_of_columns: scale groups along N that the kernel supports in one tile.

    Raises:
        MoEExtError: the tile does not fit one of them.
    """
    block_m, block_n, block_k = tile
    group_n, group_k = quantization.block_shape or (0, 0)
    if align_block_m % block_m:
        raise MoEExtError(
            f"block_m={block_m} does not divide the alignment's blocks of {align_block_m} rows, so that a tile would "
            "span two experts: take a divisor"
        )
    if max(tile) > WIDEST_BOX:
        raise MoEExtError(f"tile {tile} has a side of more than {WIDEST_BOX}, the most that TMA moves at once")
    if group_n and group_n % block_n and block_n not in range(group_n, groups_of_columns * group_n + 1, group_n):
        raise MoEExtError(
            f"block_n={block_n} with scale groups of {group_n} columns: take a divisor of it, or at "
            f"most {groups_of_columns} groups"
        )
    if group_k and group_k % block_k:
        raise MoEExtError(f"block_k={block_k} spans more than one scale of {group_k} along K: take a divisor")
    if k % block_k and capability(device) >= BLACKWELL:
        # triton-lang/triton issue 10927: dots of loads through a descriptor go wrong there (Triton 3.6.0).
        raise MoEExtError(f"block_k={block_k} does not divide K={k}, which goes wrong on Blackwell: take a divisor")


@dataclass(frozen=True, slots=True)
class _Address:
    """The part of a tensor that a descriptor reads, so that a cached descriptor keeps no tensor alive."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


_kept: dict[tuple[Any, ...], TensorDescriptor] = {}


def descriptor(tensor: Tensor, *box: int) -> TensorDescriptor:
    """The TMA descriptor of a tensor and a box, cached by address, shape, strides and box, which are all it holds."""
    address, shape, strides = tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
    if tensor.device.type == "cpu":  # Triton's interpreter asks for the tensor itself
        return TensorDescriptor(tensor, list(shape), list(strides), list(box))
    key = (address, tensor.dtype, shape, strides, box)
    found = _kept.get(key)
    if found is None:
        if len(_kept) >= DESCRIPTORS_KEPT:
            _kept.clear()
        found = TensorDescriptor(_Address(address, tensor.dtype), list(shape), list(strides), list(box))
        _kept[key] = found
    return found


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors; 1 without a GPU, as in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """(9, 0) for Hopper; (0, 0) where there is no GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def grid(config: UpConfig | DownConfig, tiles: int, device: torch.device) -> tuple[int]:
    """Programs to launch: one for each tile, or as many as stay resident where the kernel is persistent."""
    resident = multiprocessors(device) * config.programs_per_sm
    return (min(tiles, resident) if config.persistent else tiles,)
