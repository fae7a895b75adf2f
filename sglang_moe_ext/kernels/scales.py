"""Quantised operands: stored values, their scales, and the way there and back, in plain torch and float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sglang_moe_ext.core import MoEExtError, Quantisation

STORED_DTYPE = {"fp8_w8a8": torch.float8_e4m3fn, "int8_w8a8": torch.int8}
SMALLEST_AMAX = 1e-10
"""The engine's quantisers take this for a group of zeros, so that no scale is zero."""


@dataclass(frozen=True, slots=True)
class Scales:
    """float32 factors that turn stored values into real ones.

    activations: [rows, ceil(K / block_k)] block-wise, [rows, 1] per channel, [1] per tensor;
    weights: [experts, ceil(N / block_n), ceil(K / block_k)] block-wise, [experts, N, 1] per channel, [experts] per
    tensor.
    """

    quantisation: Quantisation
    activations: Tensor
    weights: Tensor


def quantise_weights(weights: Tensor, quantisation: Quantisation) -> tuple[Tensor, Tensor]:
    """(stored [experts, N, K], scales as in `Scales.weights`)."""
    group = _weight_group(weights, quantisation)
    # One expert at a time: a float32 copy of all of them may not fit beside them.
    by_expert = [_quantise(expert, quantisation, group) for expert in weights]
    scale = torch.stack([scale for _, scale in by_expert])
    stored = torch.stack([stored for stored, _ in by_expert])
    return stored, scale if quantisation.is_block_wise or quantisation.per_channel else scale.flatten()


def quantise_activations(activations: Tensor, quantisation: Quantisation) -> tuple[Tensor, Tensor]:
    """(stored [rows, K], scales as in `Scales.activations`), as the engine does it when the scale is dynamic."""
    rows, k = activations.shape
    match quantisation.block_shape:
        case (_, block_k):
            group = (1, block_k)
        case None:
            group = (1, k) if quantisation.per_channel else (rows, k)
    stored, scale = _quantise(activations, quantisation, group)
    return stored, scale if quantisation.is_block_wise or quantisation.per_channel else scale.flatten()


def real_weights(weights: Tensor, expert: int, scales: Scales | None) -> Tensor:
    """[N, K] float32 of one expert."""
    real = weights[expert].float()
    if scales is None:
        return real
    group = _weight_group(weights, scales.quantisation)
    return real * _spread(scales.weights[expert].reshape(-(-real.shape[0] // group[0]), -1), group, *real.shape)


def real_rows(a: Tensor, rows: Tensor, scales: Scales | None) -> Tensor:
    """[len(rows), K] float32 of the rows of `a` with these numbers."""
    # Indexing is not implemented for float8 everywhere; its bytes are.
    real = (a.view(torch.uint8)[rows].view(a.dtype) if a.element_size() == 1 else a[rows]).float()
    if scales is None:
        return real
    if scales.activations.numel() == 1:
        return real * scales.activations
    block = scales.quantisation.block_shape
    return real * _spread(scales.activations[rows], (1, block[1] if block else real.shape[1]), *real.shape)


def _quantise(values: Tensor, quantisation: Quantisation, group: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(stored, scale of each group) of `values` [rows, columns]; groups at the edges may be smaller."""
    dtype = STORED_DTYPE.get(quantisation.scheme or "")
    if dtype is None:
        raise MoEExtError(f"cannot quantise to {quantisation}; choose one of {', '.join(STORED_DTYPE)}")
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    real = values.float()
    rows, columns = real.shape
    edges = (0, -columns % group[1], 0, -rows % group[0])
    padded = pad(real.abs(), edges)
    blocks = padded.reshape(padded.shape[0] // group[0], group[0], -1, group[1])
    scale = blocks.amax(dim=(1, 3)).clamp_min(SMALLEST_AMAX) / largest
    unscaled = (real / _spread(scale, group, rows, columns)).clamp(-largest, largest)
    return (unscaled.round() if dtype == torch.int8 else unscaled).to(dtype), scale


def _weight_group(weights: Tensor, quantisation: Quantisation) -> tuple[int, int]:
    _, columns, k = weights.shape
    return quantisation.block_shape or ((1, k) if quantisation.per_channel else (columns, k))


def _spread(scale: Tensor, group: tuple[int, int], rows: int, columns: int) -> Tensor:
    """One scale a group -> one scale a value, [rows, columns]."""
    return scale.repeat_interleave(group[0], dim=0)[:rows].repeat_interleave(group[1], dim=1)[:, :columns]
