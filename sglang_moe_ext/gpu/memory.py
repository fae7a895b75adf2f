"""Whether the experts of a model fit into the memory of a GPU."""

from __future__ import annotations

from sglang_moe_ext.core import PROJECTIONS, Gpu, MoEShape

GIB = 1 << 30


def expert_bytes(shape: MoEShape) -> int:
    """Bytes of the expert weights of one layer on one rank, without scales."""
    elements = sum(columns * reduction for columns, reduction in map(shape.gemm, PROJECTIONS))
    return shape.experts * elements * shape.quantization.weight_bits // 8


def why_too_large(shape: MoEShape, gpu: Gpu, moe_layers: int | None) -> str | None:
    """One line where the experts alone need more memory than the GPU has; None where they fit, or nothing is known.

    With `moe_layers` None only one layer is counted.
    """
    layer, memory = expert_bytes(shape), gpu.memory_gib
    layers = moe_layers or 1
    if memory is None or layer * layers <= memory * GIB:
        return None
    parts = f"{layers} layers of {layer / GIB:.1f} GiB" if layers > 1 else "one layer"
    return (
        f"the experts of one rank take {layer * layers / GIB:.0f} GiB ({parts}), and {gpu.device_name} has "
        f"{memory:.0f} GiB: they do not fit; use more ranks (--tp-size) or weights with fewer bits"
    )
