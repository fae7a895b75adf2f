"""Which experts the tokens of a test batch take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglang_moe_ext.core import MoEShape

if TYPE_CHECKING:
    import torch

REMOTE = -1
"""The id of an expert that lies on another rank."""


@dataclass(frozen=True, slots=True)
class Routing:
    """topk_ids int32 and topk_weights float32, both [tokens, topk]; an id is -1 where another rank has the expert."""

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


def uniform(shape: MoEShape, tokens: int, seed: int, device: str) -> Routing:
    """Each token takes different routed experts, all equally likely, and then each fused shared expert."""
    import torch

    generator = torch.Generator(device=device).manual_seed(seed)
    local = shape.experts - shape.fused_shared
    scores = torch.rand(tokens, local * shape.ep, generator=generator, device=device)
    ids = scores.topk(shape.top_k - shape.fused_shared, dim=1).indices
    ids = torch.where(ids < local, ids, REMOTE)
    shared = torch.arange(local, shape.experts, device=device).expand(tokens, -1)
    ids = torch.cat((ids, shared), dim=1).to(torch.int32).contiguous()
    weights = torch.rand(tokens, shape.top_k, generator=generator, device=device) + 0.1
    return Routing(ids, (weights / weights.sum(dim=1, keepdim=True)).contiguous())
