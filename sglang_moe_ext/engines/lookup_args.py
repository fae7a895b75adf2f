"""What a call of an engine's lookup says of the layer that asks: its arguments as one of our shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from sglang_moe_ext.core import MoEShape, Quantization, Scheme
from sglang_moe_ext.schemes import SCHEMES, find_row


@dataclass(frozen=True, slots=True)
class LookupLayer:
    """The layer of one call: w1 [experts, rows, hidden], w2 [experts, hidden, intermediate], int4 packed.

    `shape` is the layer as our tables know it; None if it is of a kind that we have no tables for.
    """

    w1_shape: tuple[int, ...]
    w2_shape: tuple[int, ...]
    top_k: int
    dtype: str | None
    block_shape: tuple[int, int] | None
    per_channel: bool
    shape: MoEShape | None = field(compare=False)


def lookup_layer(
    w1_shape: Sequence[int],
    w2_shape: Sequence[int],
    top_k: int,
    dtype: str | None,
    block_shape: Sequence[int] | None,
    per_channel: bool = False,
) -> LookupLayer:
    """The layer that a call of `try_get_optimal_moe_config` is about.

    Raises:
        TypeError, ValueError, LookupError: the arguments are no shapes of weights, or no block of scales.
    """
    block = None if not block_shape else (int(block_shape[0]), int(block_shape[1]))
    w1, w2, per_channel = tuple(w1_shape), tuple(w2_shape), bool(per_channel)
    return LookupLayer(w1, w2, top_k, dtype, block, per_channel, _shape(w1, w2, top_k, dtype, block, per_channel))


def _shape(
    w1: tuple[int, ...],
    w2: tuple[int, ...],
    top_k: int,
    dtype: str | None,
    block: tuple[int, int] | None,
    per_channel: bool,
) -> MoEShape | None:
    """A call tells neither bf16 from fp16, nor which experts are fused shared ones; neither is in a table's name."""
    if dtype is not None and dtype not in SCHEMES:
        return None
    scheme = cast("Scheme | None", dtype)
    experts, hidden_size, columns = w2
    intermediate_size = columns * find_row(scheme).weights_per_element
    return MoEShape(
        experts=experts,
        intermediate_size=intermediate_size,
        hidden_size=hidden_size,
        top_k=top_k,
        quantization=Quantization(scheme, block, per_channel),
        gated=w1[1] > intermediate_size,
    )


def layer_from_name(
    experts: int, intermediate_size: int, dtype: str | None, block_shape: tuple[int, int] | None
) -> LookupLayer:
    """A layer of which only what a table's name says is known; its hidden size and top-k are meaningless."""
    columns = intermediate_size // (1 if dtype not in SCHEMES else find_row(dtype).weights_per_element)
    return lookup_layer((experts, 2 * intermediate_size, 1), (experts, 1, columns), 1, dtype, block_shape)
