"""What vLLM's launchers make of a configuration before their kernels run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_moe_ext.core import MoEShape, TileConfig
from sglang_moe_ext.engines.config_dict import ConfigDict, launch_args

SPLIT_K = "SPLIT_K"


def clamp_to_block(entry: Mapping[str, Any], shape: MoEShape) -> ConfigDict:
    """The entry as the launcher cuts it: BLOCK_SIZE_K is no larger than either side of a block of scales."""
    quantization = shape.quantization
    if not quantization.is_block_wise or quantization.block_shape is None:
        return dict(entry)
    return {**entry, "BLOCK_SIZE_K": min(entry["BLOCK_SIZE_K"], *quantization.block_shape)}


def config_dict_of(config: TileConfig) -> ConfigDict:
    """A fresh entry. `fused_moe_kernel_gptq_awq` has SPLIT_K as a constant without a default; there is only 1."""
    return {**launch_args(config), SPLIT_K: 1}
