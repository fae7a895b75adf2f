"""Say how the configuration that runs differs from the one that is written in the table."""

from __future__ import annotations

from dataclasses import fields

from sglang_moe_ext.core import Gpu, MoEShape, TileConfig
from sglang_moe_ext.gpu.shared_memory import smem_bytes

_NAMES = {
    "block_m": "BLOCK_SIZE_M",
    "block_n": "BLOCK_SIZE_N",
    "block_k": "BLOCK_SIZE_K",
    "group_m": "GROUP_SIZE_M",
    "num_warps": "num_warps",
    "num_stages": "num_stages",
    "use_tma": "USE_TMA",
}


def describe_change(written: TileConfig, taken: TileConfig, shape: MoEShape, gpu: Gpu) -> str | None:
    """What was changed, and why where the reason is known; None where the entry runs as it is written."""
    if written == taken:
        return None
    names = [field.name for field in fields(TileConfig) if getattr(written, field.name) != getattr(taken, field.name)]
    changes = ", ".join(f"{_NAMES[name]} {getattr(written, name)} -> {getattr(taken, name)}" for name in names)
    asked = smem_bytes(written, shape, gpu.sm)
    if asked > gpu.smem_per_block and smem_bytes(taken, shape, gpu.sm) <= gpu.smem_per_block:
        return (
            f"fitted to {gpu.smem_per_block / 1024:.0f} KiB of shared memory: {changes}; the engine alone would end, "
            f"since the entry asks for {asked / 1024:.0f} KiB"
        )
    if names == ["use_tma"]:
        return f"{changes}: the engine's kernel would end or compute wrong results with it"
    if names == ["block_m"]:
        return f"{changes}: both GEMMs share one sort of the tokens"
    return f"not as written: {changes}"
