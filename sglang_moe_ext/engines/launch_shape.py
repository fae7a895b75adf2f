"""Read the GEMM of a launch from the arguments that the fused-MoE launchers of both engines have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_moe_ext.core import MoEShape, Quantization, Scheme

_FLAGS: tuple[tuple[str, Scheme], ...] = (
    ("use_fp8_w8a8", "fp8_w8a8"),
    ("use_int8_w8a8", "int8_w8a8"),
    ("use_int8_w8a16", "int8_w8a16"),
    ("use_int4_w4a16", "int4_w4a16"),
)


def shape_of(arguments: Mapping[str, Any]) -> MoEShape:
    """The GEMM of a launcher's arguments by name; `intermediate_size` is the columns of this GEMM alone."""
    scheme = next((scheme for flag, scheme in _FLAGS if arguments.get(flag)), None)
    block = arguments.get("block_shape")
    experts, columns, reduction = arguments["B"].shape
    quantization = Quantization(scheme, (int(block[0]), int(block[1])) if block else None)
    return MoEShape(experts, columns, reduction, arguments["top_k"], quantization, gated=False)
