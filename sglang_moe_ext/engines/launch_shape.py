"""Read the GEMM of a launch from the arguments that the fused-MoE launchers of both engines have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_moe_ext.core import MoEShape, Quantization
from sglang_moe_ext.schemes import SCHEMES


def shape_of(arguments: Mapping[str, Any]) -> MoEShape:
    """The GEMM of a launcher's arguments by name; `intermediate_size` is the columns of this GEMM alone."""
    scheme = next((row.name for row in SCHEMES.values() if arguments.get(row.launch_flag)), None)
    block = arguments.get("block_shape")
    experts, columns, reduction = arguments["B"].shape
    quantization = Quantization(scheme, (int(block[0]), int(block[1])) if block else None)
    return MoEShape(experts, columns, reduction, arguments["top_k"], quantization, gated=False)
