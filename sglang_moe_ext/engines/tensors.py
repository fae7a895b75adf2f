"""The tensors of a MoE layer and of one of its GEMMs, as every engine's kernel takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class GemmTensors:
    """The tensors of one GEMM, all on one device.

    Up: a [tokens, K], out [tokens, topk, columns]. Down: a [tokens * topk, N], out [tokens, topk, columns]. In the
    order of the experts, as TMA reads them, the up GEMM's out and the down GEMM's a have `padded_rows` rows.
    weights [experts, columns, reduction]; scales are None where the weights are not quantized. sorted_token_ids is None
    where an engine does not sort: so few tokens that each pair of token and expert is a block of its own.
    """

    a: torch.Tensor
    weights: torch.Tensor
    out: torch.Tensor
    weight_scale: torch.Tensor | None
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    sorted_token_ids: torch.Tensor | None
    expert_ids: torch.Tensor
    num_tokens_post_padded: torch.Tensor

    def routing_of(self, other: GemmTensors) -> dict[int, torch.Tensor | None]:
        """By the id() of each tensor of ours that says where tokens go, that of the other."""
        names = ("topk_weights", "topk_ids", "sorted_token_ids", "expert_ids", "num_tokens_post_padded")
        return {id(getattr(self, name)): getattr(other, name) for name in names}


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """Inputs of one layer: hidden [tokens, hidden], topk_ids and topk_weights [tokens, topk], weights and scales."""

    hidden: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor
    w1_scale: torch.Tensor | None
    w2_scale: torch.Tensor | None
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
