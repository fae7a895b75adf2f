"""The floor: the fewest microseconds in which a GPU can do a GEMM of the layer, from its arithmetic and its bytes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from sglang_moe_ext.core import PROJECTIONS, Gpu, MoEShape, Projection


@dataclass(frozen=True, slots=True)
class Floor:
    """Time of the arithmetic at the matrix units' dense rate, and of each byte moved once at the memory's."""

    flop_us: float
    byte_us: float

    @property
    def us(self) -> float:
        return max(self.flop_us, self.byte_us)


@dataclass(frozen=True, slots=True)
class Load:
    """How uniform routing loads this rank's experts; `routed` is the mean number of rows of one routed expert."""

    rows: float
    active_experts: float
    routed: float


def load(shape: MoEShape, tokens: int) -> Load:
    """Expected load for that many tokens: each takes its routed experts uniformly, and every fused shared expert."""
    routed_experts = (shape.experts - shape.fused_shared) * shape.ep
    chance = (shape.top_k - shape.fused_shared) / routed_experts
    active = (shape.experts - shape.fused_shared) * (1 - (1 - chance) ** tokens) + shape.fused_shared
    rows = tokens * (shape.top_k - shape.fused_shared) / shape.ep + tokens * shape.fused_shared
    return Load(rows=rows, active_experts=active, routed=tokens * chance)


def gemm_floor(shape: MoEShape, gpu: Gpu, tokens: int, projection: Projection) -> Floor:
    """The floor of one GEMM: weights of the active experts, activations in, results out."""
    expected = load(shape, tokens)
    columns, reduction = shape.gemm(projection)
    activation_bits = shape.quantization.activation_bits
    flops = 2.0 * expected.rows * columns * reduction
    weight_bytes = expected.active_experts * columns * reduction * shape.quantization.weight_bits / 8
    rows_in = tokens if projection == "up" else expected.rows
    moved = weight_bytes + rows_in * reduction * activation_bits / 8 + expected.rows * columns * 2
    return Floor(flop_us=flops / gpu.tflops(activation_bits) * 1e-6, byte_us=moved / gpu.bandwidth_gbs * 1e-3)


def pair_floor_us(shape: MoEShape, gpu: Gpu, tokens: int) -> float:
    """The floor of the up and the down GEMM together."""
    return sum(gemm_floor(shape, gpu, tokens, projection).us for projection in PROJECTIONS)


@functools.lru_cache(maxsize=4096)
def expected_blocks(mean_rows: float, block_m: int) -> float:
    """Mean number of M blocks of an expert whose rows are Poisson distributed; the last one is padded."""
    if mean_rows <= 0:
        return 0.0
    spread = math.sqrt(mean_rows)
    if mean_rows > 4 * block_m and spread > block_m:
        return mean_rows / block_m + 0.5
    lowest = max(1, int(mean_rows - 9 * spread - 9))
    highest = int(mean_rows + 9 * spread + 9)
    return math.fsum(
        math.exp(rows * math.log(mean_rows) - mean_rows - math.lgamma(rows + 1)) * -(-rows // block_m)
        for rows in range(lowest, highest + 1)
    )
