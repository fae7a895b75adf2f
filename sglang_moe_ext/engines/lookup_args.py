"""What a call of an engine's lookup says of the layer that asks: its arguments as one of our shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from sglang_moe_ext.core import MoEShape, Quantization, Scheme
from sglang_moe_ext.schemes import SCHEMES, find_row


@dataclass(frozen=True, slots=True)
class LookupLayer:
    """The layer of one call: w1 [experts, rows, hidden], w2 [experts, hidden, intermediate], int4 packed."""

    w1_shape: tuple[int, ...]
    w2_shape: tuple[int, ...]
    top_k: int
    dtype: str | None
    block_shape: tuple[int, int] | None
    per_channel: bool

    def shape(self) -> MoEShape | None:
        """The layer as our tables know it, or None where it is of a kind that we have no tables for.

        The call does not tell bf16 from fp16, nor which experts are fused shared ones; neither is in a table's name.
        """
        if self.dtype is not None and self.dtype not in SCHEMES:
            return None
        scheme = cast("Scheme | None", self.dtype)
        experts, hidden_size, columns = self.w2_shape
        intermediate_size = columns * find_row(scheme).weights_per_element
        return MoEShape(
            experts=experts,
            intermediate_size=intermediate_size,
            hidden_size=hidden_size,
            top_k=self.top_k,
            quantization=Quantization(scheme, self.block_shape, self.per_channel),
            gated=self.w1_shape[1] > intermediate_size,
        )


def lookup_layer(
    w1_shape: Sequence[int],
    w2_shape: Sequence[int],
    top_k: int,
    dtype: str | None,
    block_shape: Sequence[int] | None,
    per_channel: bool = False,
) -> LookupLayer:
    """The layer that a call of `try_get_optimal_moe_config` is about."""
    block = None if not block_shape else (int(block_shape[0]), int(block_shape[1]))
    return LookupLayer(tuple(w1_shape), tuple(w2_shape), top_k, dtype, block, bool(per_channel))


def layer_from_name(
    experts: int, intermediate_size: int, dtype: str | None, block_shape: tuple[int, int] | None
) -> LookupLayer:
    """A layer of which only what stands in a table's name is known: nobody may ask its hidden size, nor its top-k."""
    columns = intermediate_size // (1 if dtype not in SCHEMES else find_row(dtype).weights_per_element)
    return lookup_layer((experts, 2 * intermediate_size, 1), (experts, 1, columns), 1, dtype, block_shape)
