"""Quantized operands: stored values, their scales, and the way there and back, in plain torch and float32.

Weights as SGLang's kernels read them, [experts E, columns N, reduction K] (sglang 0.5.8, 0.5.15, 0.5.23; files under
srt/layers/quantization):

fp8_w8a8 block: float8_e4m3fn, float32 scales [E, ceil(N / n), ceil(K / k)] (fp8.py, weight_scale_inv);
fp8_w8a8 channel: float8_e4m3fn, float32 [E, N, 1] (w8a8_fp8.py);
fp8_w8a8 tensor: float8_e4m3fn, float32 [E] (fp8.py, modelopt_quant.py: both halves of w13 share the larger scale);
int8_w8a8 block: int8, float32 [E, ceil(N / n), ceil(K / k)] (blockwise_int8.py);
int8_w8a8 channel: int8, float32 [E, N, 1] (w8a8_int8.py);
int8_w8a16 group: uint8 with zero point 128, scales of the activations' dtype [E, N, K / group] (moe_wna16.py);
int8_w8a16 channel: int8 without zero point, float32 [E, N, 1] (fused_moe_kernel reads it; no method there fills it);
int4_w4a16 group: uint8 [E, N, K / 2], even K in the low nibble, zero point 8, scales of the activations' dtype
[E, N, K / group] (moe_wna16.py; since 0.5.10 compressed_tensors_wNa16_moe.py on ROCm).

The zero points are those that fused_moe_kernel_gptq_awq supposes where it is given none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sglang_moe_ext.core import MoEExtError, Quantization
from sglang_moe_ext.schemes import SCHEMES

STORED_DTYPE: dict[str, torch.dtype] = {
    row.name: getattr(torch, row.stored_dtype)
    for row in SCHEMES.values()
    if row.name and row.stored_dtype and row.activation_bits == 8
}
"""Of schemes that quantize both operands."""
LARGEST = {row.name: row.largest for row in SCHEMES.values() if row.name and row.largest is not None}
"""The value that the largest of a group becomes."""
SMALLEST_AMAX = 1e-10
"""The engine's quantizers take this for a group of zeros, so that no scale is zero."""
INT4_ZERO_POINT, INT8_ZERO_POINT = 8, 128


@dataclass(frozen=True, slots=True)
class Scales:
    """Factors that turn stored values into real ones.

    activations, float32: [rows, ceil(K / block_k)] block-wise, [rows, 1] per channel, [1] per tensor, None where the
    activations are not quantized; weights: as the module says.
    """

    quantization: Quantization
    activations: Tensor | None
    weights: Tensor


def quantize_weights(weights: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """(stored, scales) of [experts, N, K] in the activations' dtype, laid out as the module says.

    Raises: MoEExtError where no kernel of the engine reads weights of this kind.
    """
    _, columns, k = weights.shape
    _refuse_unreadable(quantization, k)
    group = _weight_group(columns, k, quantization)
    scale_dtype = weights.dtype if _is_grouped(quantization) else torch.float32
    stored, scales = [], []
    for expert in weights:  # a float32 copy of all of them may not fit beside them
        unscaled, scale = _quantize(expert, quantization, group, scale_dtype)
        stored.append(_weights(unscaled, quantization))
        scales.append(scale)
    return torch.stack(stored), torch.cat(scales).flatten() if _is_per_tensor(quantization) else torch.stack(scales)


def to_fnuz(stored: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fnuz, scales) of the same values as float8_e4m3fn with its scales, for AMD's gfx942.

    The same bits mean half as much there, and those of -0 are its NaN, so they become 0.
    """
    bits = stored.view(torch.int8)
    bits = torch.where(bits == -128, torch.zeros_like(bits), bits)
    return bits.view(torch.float8_e4m3fnuz), scale * 2


def quantize_activations(activations: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor]:
    """(stored [rows, K], scales as in `Scales.activations`), as the engine does it when the scale is dynamic.

    Raises: MoEExtError where the scheme leaves activations as they are.
    """
    if quantization.scheme not in STORED_DTYPE:
        raise MoEExtError(f"{quantization} leaves activations in 16 bits; quantize those of {', '.join(STORED_DTYPE)}")
    rows, k = activations.shape
    match quantization.block_shape:
        case (_, block_k):
            group = (1, block_k)
        case None:
            group = (1, k) if quantization.per_channel else (rows, k)
    unscaled, scale = _quantize(activations, quantization, group, torch.float32)
    return _eight_bits(unscaled, quantization), scale.flatten() if _is_per_tensor(quantization) else scale


def as_the_gemm_reads(activations: Tensor, weight_scale: Tensor, quantization: Quantization) -> tuple[Tensor, Scales]:
    """The activations of a quantized GEMM, quantized where the scheme says so, with the scales of both operands."""
    if quantization.scheme not in STORED_DTYPE:
        return activations, Scales(quantization, None, weight_scale)
    stored, scale = quantize_activations(activations, quantization)
    return stored, Scales(quantization, scale, weight_scale)


def real_weights(weights: Tensor, expert: int, scales: Scales | None) -> Tensor:
    """[N, K] float32 of one expert."""
    if scales is None:
        return weights[expert].float()
    real = _unscaled(weights[expert], scales.quantization)
    columns, k = real.shape
    group = _weight_group(columns, k, scales.quantization)
    scale = scales.weights[expert].float().reshape(-(-columns // group[0]), -1)
    return real * _spread(scale, group, columns, k)


def real_rows(a: Tensor, rows: Tensor, scales: Scales | None) -> Tensor:
    """[len(rows), K] float32 of the rows of `a` with these numbers."""
    # Indexing is not implemented for float8 everywhere; its bytes are.
    real = (a.view(torch.uint8)[rows].view(a.dtype) if a.element_size() == 1 else a[rows]).float()
    if scales is None or scales.activations is None:
        return real
    if scales.activations.numel() == 1:
        return real * scales.activations
    block = scales.quantization.block_shape
    return real * _spread(scales.activations[rows], (1, block[1] if block else real.shape[1]), *real.shape)


def _quantize(
    values: Tensor, quantization: Quantization, group: tuple[int, int], scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(float32 values over their scale, scale of each group) of [rows, columns]; groups at the edges may be smaller."""
    assert quantization.scheme is not None
    largest = LARGEST[quantization.scheme]
    real = values.float()
    rows, columns = real.shape
    edges = (0, -columns % group[1], 0, -rows % group[0])
    padded = pad(real.abs(), edges)
    blocks = padded.reshape(padded.shape[0] // group[0], group[0], -1, group[1])
    exact = blocks.amax(dim=(1, 3)).clamp_min(SMALLEST_AMAX) / largest
    scale = exact.clamp_min(torch.finfo(scale_dtype).tiny).to(scale_dtype)
    return (real / _spread(scale.float(), group, rows, columns)).clamp(-largest, largest), scale


def _eight_bits(unscaled: Tensor, quantization: Quantization) -> Tensor:
    return unscaled.to(torch.float8_e4m3fn) if quantization.scheme == "fp8_w8a8" else unscaled.round().to(torch.int8)


def _weights(unscaled: Tensor, quantization: Quantization) -> Tensor:
    """[N, K] as the engine stores it, [N, K / 2] for int4."""
    if not _is_grouped(quantization):
        return _eight_bits(unscaled, quantization)
    if quantization.scheme == "int8_w8a16":
        return (unscaled.round() + INT8_ZERO_POINT).to(torch.uint8)
    nibbles = (unscaled.round() + INT4_ZERO_POINT).to(torch.uint8)
    return nibbles[:, ::2] + nibbles[:, 1::2] * 16


def _unscaled(stored: Tensor, quantization: Quantization) -> Tensor:
    """float32 [N, K]: the way back from `_weights`."""
    if not _is_grouped(quantization):
        return stored.float()
    if quantization.scheme == "int8_w8a16":
        return stored.float() - INT8_ZERO_POINT
    return torch.stack((stored & 15, stored >> 4), dim=-1).flatten(-2).float() - INT4_ZERO_POINT


def _refuse_unreadable(quantization: Quantization, k: int) -> None:
    block = quantization.block_shape
    match quantization.scheme:
        case "int4_w4a16":
            readable, expected = _is_grouped(quantization) and k % 2 == 0, "block_shape (0, group), and K even"
        case "int8_w8a16":
            readable = _is_grouped(quantization) or (block is None and quantization.per_channel)
            expected = "block_shape (0, group), or one scale a channel"
        case "fp8_w8a8" | "int8_w8a8":
            readable, expected = block is None or quantization.is_block_wise, "both sides of block_shape, or none"
        case None:
            readable, expected = False, f"one of {', '.join(LARGEST)}"
    if not readable:
        raise MoEExtError(f"cannot quantize weights with K = {k} to {quantization}: expected {expected}")


def _is_grouped(quantization: Quantization) -> bool:
    """True where one scale covers a group along K of one column; such weights carry a zero point."""
    return quantization.block_shape is not None and quantization.block_shape[0] == 0 < quantization.block_shape[1]


def _is_per_tensor(quantization: Quantization) -> bool:
    return quantization.block_shape is None and not quantization.per_channel


def _weight_group(columns: int, k: int, quantization: Quantization) -> tuple[int, int]:
    """(columns, reduction) that share one scale."""
    if quantization.block_shape is None:
        return (1, k) if quantization.per_channel else (columns, k)
    return max(quantization.block_shape[0], 1), quantization.block_shape[1]


def _spread(scale: Tensor, group: tuple[int, int], rows: int, columns: int) -> Tensor:
    """One scale a group -> one scale a value, [rows, columns]."""
    return scale.repeat_interleave(group[0], dim=0)[:rows].repeat_interleave(group[1], dim=1)[:, :columns]
