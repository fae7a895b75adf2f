"""What engines run experts by whose weights alone are quantized: Marlin, or the Triton kernel of moe_wna16."""

from __future__ import annotations

from sglang_moe_ext.core import ModelError, MoEShape, Quantization

_SMALLEST_GROUP = 32
_MARLIN_GROUPS = (None, 32, 64, 128)
_MARLIN_HIDDEN, _MARLIN_COLUMNS = 128, 64


def is_weight_only(quantization: Quantization) -> bool:
    """True where activations stay in 16 bits and weights do not."""
    return quantization.scheme is not None and quantization.activation_bits == 16


def stored_group(quantization: Quantization) -> int | None:
    """Weights along K that share a scale in the checkpoint, whatever a split has made of it; None: a whole channel."""
    if quantization.checkpoint is not None:
        return quantization.checkpoint.group
    return None if quantization.block_shape is None else quantization.block_shape[1]


def marlin_takes(shape: MoEShape, *, pads_columns: bool) -> bool:
    """As `check_moe_marlin_supports_layer` of SGLang 0.5.8 to 0.5.23 and vLLM 0.20 to 0.33 (marlin_utils.py) answers.

    `pads_columns`: a rank's columns need not be a multiple of Marlin's tile, but of a group (vLLM from 0.25 on).
    """
    group = stored_group(shape.quantization)
    if shape.hidden_size % _MARLIN_HIDDEN or group not in _MARLIN_GROUPS:
        return False
    if pads_columns:
        return group is None or shape.intermediate_size % group == 0
    return shape.intermediate_size % max(_MARLIN_COLUMNS, group or 0) == 0


def halve_group(
    quantization: Quantization, intermediate_size: int, hidden_size: int, name: str, engine: str
) -> Quantization:
    """The quantization with the group that `MoeWNA16Method.create_weights` of both engines makes of the stored one.

    Raises: ModelError when no group of 32 or more divides a rank's columns: the engine asserts that one does.
    """
    if quantization.block_shape is None or quantization.is_block_wise:
        return quantization
    stored = group = quantization.block_shape[1]
    while intermediate_size % group or hidden_size % group:
        group //= 2
        if group < _SMALLEST_GROUP:
            raise ModelError(
                f"{name}: {intermediate_size} columns a rank are no multiple of its group of {stored} weights, nor of "
                f"a half of it from {_SMALLEST_GROUP} on: {engine} refuses that; use a smaller --tp-size, or --ep-size"
            )
    return Quantization(quantization.scheme, (0, group), quantization.per_channel, quantization.checkpoint)
