"""A lower bound on the time of each GEMM of the layer on a GPU, from its arithmetic and its bytes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from sglang_moe_ext.core import PROJECTIONS, Gpu, MoEShape, Projection


@dataclass(frozen=True, slots=True)
class Floor:
    """Microseconds for the arithmetic at the dense rate, and for moving each byte once at the memory bandwidth."""

    flop_us: float
    byte_us: float

    @property
    def us(self) -> float:
        return max(self.flop_us, self.byte_us)


@dataclass(frozen=True, slots=True)
class Load:
    """Load of this rank's experts under uniform routing; `routed` is the mean number of rows per routed expert."""

    rows: float
    active_experts: float
    routed: float


def load(shape: MoEShape, tokens: int) -> Load:
    """Expected load: each token takes its routed experts uniformly, and every fused shared expert."""
    routed_experts = (shape.experts - shape.fused_shared) * shape.ep
    chance = (shape.top_k - shape.fused_shared) / routed_experts
    active = (shape.experts - shape.fused_shared) * (1 - (1 - chance) ** tokens) + shape.fused_shared
    rows = tokens * (shape.top_k - shape.fused_shared) / shape.ep + tokens * shape.fused_shared
    return Load(rows=rows, active_experts=active, routed=tokens * chance)


def gemm_floor(shape: MoEShape, gpu: Gpu, tokens: int, projection: Projection) -> Floor:
    """Floor of one GEMM: weights of the active experts, activations in, results out."""
    expected = load(shape, tokens)
    columns, reduction = shape.gemm(projection)
    activation_bits = shape.quantization.activation_bits
    flops = 2.0 * expected.rows * columns * reduction
    weight_bytes = expected.active_experts * columns * reduction * shape.quantization.weight_bits / 8
    rows_in = tokens if projection == "up" else expected.rows
    moved = weight_bytes + rows_in * reduction * activation_bits / 8 + expected.rows * columns * 2
    return Floor(flop_us=flops / gpu.tflops(activation_bits) * 1e-6, byte_us=moved / gpu.bandwidth_gbs * 1e-3)


def pair_floor_us(shape: MoEShape, gpu: Gpu, tokens: int) -> float:
    """Floor of the up and the down GEMM together, in microseconds."""
    return sum(gemm_floor(shape, gpu, tokens, projection).us for projection in PROJECTIONS)


@functools.lru_cache(maxsize=4096)
def expected_blocks(mean_rows: float, block_m: int) -> float:
    """Mean number of M blocks per expert when its number of rows is Poisson distributed; the last block is padded."""
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
