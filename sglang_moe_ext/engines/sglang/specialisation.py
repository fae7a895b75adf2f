"""Which batch sizes share one binary of SGLang's kernel: Triton compiles for what it sees of each integer."""

from __future__ import annotations

from sglang_moe_ext.core import MoEShape

_ALIGNMENT = 16
"""Triton keeps apart the integers that this divides, and the integer 1."""
_EARLY_DEPENDENTS = 512
"""Since 0.5.19 the kernel has a constant that says whether there are at most so many tokens."""


def _class(shape: MoEShape, tokens: int) -> tuple[object, ...]:
    slots = tokens * shape.top_k
    # The size of the sorted buffer is another function of the slots where there are fewer of them than experts.
    return slots == 1, slots % _ALIGNMENT, slots < shape.experts + 1, tokens <= _EARLY_DEPENDENTS


def representative_tokens(shape: MoEShape, tokens: int) -> int:
    """The smallest batch size whose launch runs the same binary as this one's."""
    wanted = _class(shape, tokens)
    start = _EARLY_DEPENDENTS + 1 if tokens > _EARLY_DEPENDENTS else 1
    return next((m for m in range(start, tokens) if _class(shape, m) == wanted), tokens)
