"""A matrix product of one tile, as small as the engines' kernels have it inside; compiled, and never run."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(a, b, c, side: tl.constexpr, block_k: tl.constexpr):  # type: ignore[no-untyped-def]
    along, inner = tl.arange(0, side), tl.arange(0, block_k)
    left = tl.load(a + along[:, None] * block_k + inner[None, :])
    right = tl.load(b + inner[:, None] * side + along[None, :])
    tl.store(c + along[:, None] * side + along[None, :], tl.dot(left, right).to(tl.float32))
