"""Pairs of tokens and experts in the order of the experts, without padding, by torch alone. Nothing waits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class PairsByExpert:
    """tokens: int64 [pairs], the token of each row; rows: int64 [tokens, slots], the row of each pair;
    ends: int32 [experts], the row behind each expert's last."""

    tokens: torch.Tensor
    rows: torch.Tensor
    ends: torch.Tensor

    @property
    def bounds(self) -> torch.Tensor:
        """int32 [experts + 1]: 0, then `ends`."""
        import torch

        return torch.cat([self.ends.new_zeros(1), self.ends])

    def add_up(self, results: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] of `results` [pairs, hidden] and `weights` [tokens, slots]: the sum over the slots."""
        import torch

        return torch.einsum("tsh,ts->th", results[self.rows].float(), weights.float()).to(results.dtype)


def sort_pairs(topk_ids: torch.Tensor, experts: int) -> PairsByExpert:
    """Sort, stably. `topk_ids`: [tokens, slots] from 0 to experts - 1."""
    import torch

    ids = topk_ids.flatten().long()
    order = torch.argsort(ids, stable=True)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(order.numel(), device=order.device)
    counts = torch.zeros(experts, dtype=torch.int32, device=ids.device)
    counts.scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
    return PairsByExpert(order // topk_ids.shape[1], rows.view(topk_ids.shape), counts.cumsum(0).int())
