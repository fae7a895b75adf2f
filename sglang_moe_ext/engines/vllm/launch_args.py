"""What a launch of vLLM's kernel says of its GEMM: its weights as one of our shapes, and the tile that really runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_moe_ext.core import MoEShape, Quantization, TileConfig
from sglang_moe_ext.engines.config_dict import ConfigDict, launch_args
from sglang_moe_ext.schemes import SCHEMES


def shape_of(arguments: Mapping[str, Any]) -> MoEShape:
    """The GEMM of a launcher's arguments by name; `intermediate_size` is the columns of this GEMM alone."""
    scheme = next((row.name for row in SCHEMES.values() if arguments.get(row.launch_flag)), None)
    block = arguments.get("block_shape")
    experts, columns, reduction = arguments["B"].shape
    quantization = Quantization(scheme, (int(block[0]), int(block[1])) if block else None)
    return MoEShape(experts, columns, reduction, arguments["top_k"], quantization, gated=False)


def clamp_to_block(entry: Mapping[str, Any], shape: MoEShape) -> ConfigDict:
    """The entry as the launcher cuts it: a tile reaches over no more of K than one block of scales."""
    quantization = shape.quantization
    if not quantization.is_block_wise or quantization.block_shape is None:
        return dict(entry)
    return {**entry, "BLOCK_SIZE_K": min(entry["BLOCK_SIZE_K"], *quantization.block_shape)}


SPLIT_K = "SPLIT_K"


def config_dict_of(config: TileConfig) -> ConfigDict:
    """A fresh entry. `fused_moe_kernel_gptq_awq` has SPLIT_K as a constant without a default; there is only 1."""
    return {**launch_args(config), SPLIT_K: 1}
