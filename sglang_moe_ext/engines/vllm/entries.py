"""One entry of vLLM's tables, as its lookup returns it: no USE_TMA, which its kernel does not know, but SPLIT_K."""

from __future__ import annotations

from sglang_moe_ext.core import TileConfig
from sglang_moe_ext.engines.entries import Entry, launched

SPLIT_K = "SPLIT_K"


def entry_of(config: TileConfig) -> Entry:
    """A fresh entry. `fused_moe_kernel_gptq_awq` has SPLIT_K as a constant without a default; there is only 1."""
    return {**launched(config), SPLIT_K: 1}
