"""Which batch sizes share one binary of vLLM's kernel: Triton compiles for what it sees of each integer."""

from __future__ import annotations

from sglang_moe_ext.core import MoEShape

_ALIGNMENT = 16
"""Triton keeps apart the integers that this divides, and the integer 1."""
_SPARSE = 4
"""With so many times more experts than pairs of token and expert, or more yet, tokens are not sorted."""


def _class(shape: MoEShape, tokens: int) -> tuple[object, ...]:
    slots, experts = tokens * shape.top_k, shape.experts * shape.ep
    # The size of the sorted buffer is another function of the slots where there are fewer of them than experts.
    return slots == 1, slots % _ALIGNMENT, slots < experts, shape.ep == 1 and _SPARSE * slots <= experts


def representative_tokens(shape: MoEShape, tokens: int) -> int:
    """The smallest batch size whose launch runs the same binary as this one's."""
    wanted = _class(shape, tokens)
    return next((m for m in range(1, tokens) if _class(shape, m) == wanted), tokens)
