"""The candidates on AMD GPUs, and the rules that drop what cannot run or win there, beside those of `space`.

The tiles are those of vLLM 0.33.0's `benchmark_moe.py`, of which SGLang's tuner (`get_rocm_configs_compute_bound`)
tries a part. Of vLLM's options for 16-bit weights those stand here that win in the tables that both engines ship for
AMD GPUs (SGLang 0.5.23, vLLM 0.33.0): matrix instructions of 16 rows in 686 of 703 entries that name one, a kpack of 2
in 516 of 703, no aim for waves in 840 of 855. For narrower weights neither tuner tries any.
"""

from __future__ import annotations

import itertools

from sglang_moe_ext.core import PROJECTIONS, Gpu, MoEShape, TileConfig
from sglang_moe_ext.tuning.search import space
from sglang_moe_ext.tuning.search.space import Rule

_BLOCKS = (16, 32, 64, 128, 256)
_STAGES = 2
"""Both tuners try no other: Triton keeps one tile less in the LDS than there are stages, and reads ahead into
registers."""
_INSTRUCTION_ROWS = 16
_WIDE_LOADS = 2
_WITHOUT_KPACK = "gfx950"
"""Triton overwrites a kpack of 2 there."""


def full_space(shape: MoEShape, gpu: Gpu) -> tuple[TileConfig, ...]:
    """2,500 configurations of 16-bit weights, 2,000 of narrower ones."""
    is_wide = shape.quantization.scheme is None
    instruction = _INSTRUCTION_ROWS if is_wide else 0
    kpack = _WIDE_LOADS if is_wide and gpu.target.gfx != _WITHOUT_KPACK else 1
    return tuple(
        TileConfig(
            block_m, block_n, block_k, group_m, warps, _STAGES, matrix_instr_nonkdim=instruction, kpack=kpack
        )
        for block_m, block_n, block_k, group_m, warps in itertools.product(
            _BLOCKS, _BLOCKS, _BLOCKS if is_wide else _BLOCKS[1:], (1, 4, 8, 16, 32), (1, 2, 4, 8)
        )
    )  # fmt: skip


def _divides_reduction(config: TileConfig, shape: MoEShape, gpu: Gpu) -> bool:
    return any(shape.gemm(projection)[1] % config.block_k == 0 for projection in PROJECTIONS)


def _accumulates_in_registers(config: TileConfig, shape: MoEShape, gpu: Gpu) -> bool:
    limit = 128 if shape.quantization.is_block_wise else 256
    return space.accumulator_registers(config, gpu.target) <= limit


RULES = (
    space.QUANTIZATION_BLOCK,
    space.WITHIN_WORK,
    Rule("reduction", "BLOCK_SIZE_K divides the length of neither GEMM's reduction", _divides_reduction),
    space.SHARED_MEMORY,
    Rule("accumulator", "its accumulator alone takes half of a wave's vector registers", _accumulates_in_registers),
)
