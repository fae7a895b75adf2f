"""This package's Triton kernels, one file each, and `reference`, the same operations in plain torch.

`grouped_gemm(a, b, offsets)` is public: a GEMM of each expert over rows that lie expert after expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_moe_ext.kernels.expert_gemm import grouped_gemm as grouped_gemm


def __getattr__(name: str) -> object:
    """Import torch and Triton for the function alone: a server imports this package without them."""
    if name == "grouped_gemm":
        from sglang_moe_ext.kernels.expert_gemm import grouped_gemm

        return grouped_gemm
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
