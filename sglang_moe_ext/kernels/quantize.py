"""Quantised operands: stored values, their scales, and the way there and back, in plain torch and float32.

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

from sglang_moe_ext.core import MoEExtError, Quantisation

STORED_DTYPE = {"fp8_w8a8": torch.float8_e4m3fn, "int8_w8a8": torch.int8}
"""Of schemes that quantise both operands."""
LARGEST = {"fp8_w8a8": torch.finfo(torch.float8_e4m3fn).max, "int8_w8a8": 127.0, "int8_w8a16": 127.0, "int4_w4a16": 7.0}
"""The value that the largest of a group becomes."""
SMALLEST_AMAX = 1e-10
"""The engine's quantisers take this for a group of zeros, so that no scale is zero."""
INT4_ZERO_POINT, INT8_ZERO_POINT = 8, 128


@dataclass(frozen=True, slots=True)
class Scales:
    """Factors that turn stored values into real ones.

    activations, float32: [rows, ceil(K / block_k)] block-wise, [rows, 1] per channel, [1] per tensor, None where the
    activations are not quantised; weights: as the module says.
    """

    quantisation: Quantisation
    activations: Tensor | None
    weights: Tensor


def quantise_weights(weights: Tensor, quantisation: Quantisation) -> tuple[Tensor, Tensor]:
    """(stored, scales) of [experts, N, K] in the activations' dtype, laid out as the module says.

    Raises: MoEExtError where no kernel of the engine reads weights of this kind.
    """
    _, columns, k = weights.shape
    _refuse_unreadable(quantisation, k)
    group = _weight_group(columns, k, quantisation)
    scale_dtype = weights.dtype if _is_grouped(quantisation) else torch.float32
    stored, scales = [], []
    for expert in weights:  # a float32 copy of all of them may not fit beside them
        unscaled, scale = _quantise(expert, quantisation, group, scale_dtype)
        stored.append(_weights(unscaled, quantisation))
        scales.append(scale)
    return torch.stack(stored), torch.cat(scales).flatten() if _is_per_tensor(quantisation) else torch.stack(scales)


def quantise_activations(activations: Tensor, quantisation: Quantisation) -> tuple[Tensor, Tensor]:
    """(stored [rows, K], scales as in `Scales.activations`), as the engine does it when the scale is dynamic.

    Raises: MoEExtError where the scheme leaves activations as they are.
    """
    if quantisation.scheme not in STORED_DTYPE:
        raise MoEExtError(f"{quantisation} leaves activations in 16 bits; quantise those of {', '.join(STORED_DTYPE)}")
    rows, k = activations.shape
    match quantisation.block_shape:
        case (_, block_k):
            group = (1, block_k)
        case None:
            group = (1, k) if quantisation.per_channel else (rows, k)
    unscaled, scale = _quantise(activations, quantisation, group, torch.float32)
    return _eight_bits(unscaled, quantisation), scale.flatten() if _is_per_tensor(quantisation) else scale


def as_the_gemm_reads(activations: Tensor, weight_scale: Tensor, quantisation: Quantisation) -> tuple[Tensor, Scales]:
    """The activations of a quantised GEMM, quantised where the scheme says so, with the scales of both operands."""
    if quantisation.scheme not in STORED_DTYPE:
        return activations, Scales(quantisation, None, weight_scale)
    stored, scale = quantise_activations(activations, quantisation)
    return stored, Scales(quantisation, scale, weight_scale)


def real_weights(weights: Tensor, expert: int, scales: Scales | None) -> Tensor:
    """[N, K] float32 of one expert."""
    if scales is None:
        return weights[expert].float()
    real = _unscaled(weights[expert], scales.quantisation)
    columns, k = real.shape
    group = _weight_group(columns, k, scales.quantisation)
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
    block = scales.quantisation.block_shape
    return real * _spread(scales.activations[rows], (1, block[1] if block else real.shape[1]), *real.shape)


def _quantise(
    values: Tensor, quantisation: Quantisation, group: tuple[int, int], scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(float32 values over their scale, scale of each group) of [rows, columns]; groups at the edges may be smaller."""
    largest = LARGEST[quantisation.scheme or ""]
    real = values.float()
    rows, columns = real.shape
    edges = (0, -columns % group[1], 0, -rows % group[0])
    padded = pad(real.abs(), edges)
    blocks = padded.reshape(padded.shape[0] // group[0], group[0], -1, group[1])
    exact = blocks.amax(dim=(1, 3)).clamp_min(SMALLEST_AMAX) / largest
    scale = exact.clamp_min(torch.finfo(scale_dtype).tiny).to(scale_dtype)
    return (real / _spread(scale.float(), group, rows, columns)).clamp(-largest, largest), scale


def _eight_bits(unscaled: Tensor, quantisation: Quantisation) -> Tensor:
    return unscaled.to(torch.float8_e4m3fn) if quantisation.scheme == "fp8_w8a8" else unscaled.round().to(torch.int8)


def _weights(unscaled: Tensor, quantisation: Quantisation) -> Tensor:
    """[N, K] as the engine stores it, [N, K / 2] for int4."""
    if not _is_grouped(quantisation):
        return _eight_bits(unscaled, quantisation)
    if quantisation.scheme == "int8_w8a16":
        return (unscaled.round() + INT8_ZERO_POINT).to(torch.uint8)
    nibbles = (unscaled.round() + INT4_ZERO_POINT).to(torch.uint8)
    return nibbles[:, ::2] + nibbles[:, 1::2] * 16


def _unscaled(stored: Tensor, quantisation: Quantisation) -> Tensor:
    """float32 [N, K]: the way back from `_weights`."""
    if not _is_grouped(quantisation):
        return stored.float()
    if quantisation.scheme == "int8_w8a16":
        return stored.float() - INT8_ZERO_POINT
    return torch.stack((stored & 15, stored >> 4), dim=-1).flatten(-2).float() - INT4_ZERO_POINT


def _refuse_unreadable(quantisation: Quantisation, k: int) -> None:
    block = quantisation.block_shape
    match quantisation.scheme:
        case "int4_w4a16":
            readable, expected = _is_grouped(quantisation) and k % 2 == 0, "block_shape (0, group), and K even"
        case "int8_w8a16":
            readable = _is_grouped(quantisation) or (block is None and quantisation.per_channel)
            expected = "block_shape (0, group), or one scale a channel"
        case "fp8_w8a8" | "int8_w8a8":
            readable, expected = block is None or quantisation.is_block_wise, "both sides of block_shape, or none"
        case None:
            readable, expected = False, f"one of {', '.join(LARGEST)}"
    if not readable:
        raise MoEExtError(f"cannot quantise weights with K = {k} to {quantisation}: expected {expected}")


def _is_grouped(quantisation: Quantisation) -> bool:
    """True where one scale covers a group along K of one column; such weights carry a zero point."""
    return quantisation.block_shape is not None and quantisation.block_shape[0] == 0 < quantisation.block_shape[1]


def _is_per_tensor(quantisation: Quantisation) -> bool:
    return quantisation.block_shape is None and not quantisation.per_channel


def _weight_group(columns: int, k: int, quantisation: Quantisation) -> tuple[int, int]:
    """(columns, reduction) that share one scale."""
    if quantisation.block_shape is None:
        return (1, k) if quantisation.per_channel else (columns, k)
    return max(quantisation.block_shape[0], 1), quantisation.block_shape[1]


def _spread(scale: Tensor, group: tuple[int, int], rows: int, columns: int) -> Tensor:
    """One scale a group -> one scale a value, [rows, columns]."""
    return scale.repeat_interleave(group[0], dim=0)[:rows].repeat_interleave(group[1], dim=1)[:, :columns]
