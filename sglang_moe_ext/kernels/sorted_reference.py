"""What the kernels over rows sorted by expert mean, in plain torch: the judge of sorted_down, short_down, gather_sum.

A *row* is an entry of sorted_token_ids, and what is defined of it is what its expert makes of it: zeros here stand for
rows of expert -1 and for those after num_tokens_post_padded, which the kernels fill with anything or leave alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_moe_ext.kernels.reference import Alignment
from sglang_moe_ext.kernels.scales import Scales, real_rows, real_weights


def in_sorted_order(values: Tensor, alignment: Alignment, padding: float = 0.0) -> Tensor:
    """[pairs, ...] -> [rows, ...]; rows of padding hold `padding`."""
    pairs = values.shape[0]
    ids = alignment.sorted_token_ids.long()
    # Indexing is not implemented for float8 everywhere; its bytes are.
    stored = values.view(torch.uint8) if values.element_size() == 1 else values
    rows = stored[ids.clamp(max=pairs - 1)]
    nothing = torch.tensor(padding, device=values.device).to(values.dtype).view(stored.dtype)
    rows[ids >= pairs] = nothing
    return rows.view(values.dtype)


def down(a: Tensor, weights: Tensor, alignment: Alignment, align_block_m: int, scales: Scales | None = None) -> Tensor:
    """[rows, N] float32 of `a` [rows, K] in sorted order."""
    out = torch.zeros(a.shape[0], weights.shape[1], dtype=torch.float32, device=a.device)
    blocks = int(alignment.num_tokens_post_padded[0]) // align_block_m
    for block, expert in enumerate(alignment.expert_ids[:blocks].tolist()):
        if expert >= 0:
            rows = torch.arange(block * align_block_m, (block + 1) * align_block_m, device=a.device)
            out[rows] = real_rows(a, rows, scales) @ real_weights(weights, expert, scales).T
    return out


def pair_positions(alignment: Alignment, align_block_m: int, tokens: int, slots: int) -> Tensor:
    """int32 [tokens, slots]: the row of each pair, -1 where it has none that an expert of this rank fills."""
    ids = alignment.sorted_token_ids[: int(alignment.num_tokens_post_padded[0])].long()
    rows = torch.arange(ids.numel(), device=ids.device)
    here = (ids < tokens * slots) & (alignment.expert_ids[rows // align_block_m] >= 0)
    positions = torch.full((tokens * slots,), -1, dtype=torch.int32, device=ids.device)
    positions[ids[here]] = rows[here].int()
    return positions.view(tokens, slots)


def gather_sum(rows: Tensor, positions: Tensor, routed_weights: Tensor, routed_scaling_factor: float = 1.0) -> Tensor:
    """[tokens, hidden] float32, slot after slot."""
    sums = torch.zeros(positions.shape[0], rows.shape[1], dtype=torch.float32, device=rows.device)
    for slot in range(positions.shape[1]):
        at = positions[:, slot].long()
        row = torch.where((at >= 0)[:, None], rows[at.clamp(min=0)].float(), 0.0)
        sums += row * routed_weights[:, slot, None].float()
    return sums * routed_scaling_factor
