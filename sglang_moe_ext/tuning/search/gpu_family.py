"""The constants of the wave model, which differ between families of GPUs: NVIDIA's, and AMD's CDNA."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_moe_ext.core import Gpu, Resources


@dataclass(frozen=True, slots=True)
class GpuFamily:
    """Times in microseconds, rates of one multiprocessor in GB/s.

    `block_start_us` and `warp_start_us`: for a block to start, and more for each of its warps. `step_us`: barrier,
    addresses and issue of one step along K; `scale_us`: what the scales of block-wise quantization add to a step.
    `busy_warps`: so many keep the matrix units of a multiprocessor busy; a block with fewer multiplies slower while it
    is alone. `lanes_per_ns`: bytes read from shared memory, or float32 operations. `loads_beside_work`: a load may
    wait in registers, so that a stage of shared memory need not be free before it starts.
    `short_row_share`: of the rest of a 128-byte line that moves along when a step wants less than the line.
    `mma_sync_share`: of the rate of instructions that four warps share, for the others.
    """

    launch_us: float
    block_start_us: float
    warp_start_us: float
    load_latency_us: float
    step_us: float
    scale_us: float
    l2_gbs: float
    store_gbs: float
    busy_warps: int
    lanes_per_ns: float
    short_row_share: float
    mma_sync_share: float
    reserved_smem: int
    loads_beside_work: bool


# Fitted to the trials in tests/data/trials (H200, SGLang 0.5.15, Triton 3.6.0, 2026-11-21), but for the rate of stores,
# 32 bytes a clock, which was chosen: the regret hardly moves with it. Shared memory: 128 bytes a clock at 1.7 GHz.
NVIDIA = GpuFamily(
    launch_us=5.8,
    block_start_us=0.8,
    warp_start_us=0.2,
    load_latency_us=0.71,
    step_us=0.078,
    scale_us=0.105,
    l2_gbs=75.0,  # 44 bytes a clock
    store_gbs=54.0,
    busy_warps=1,
    lanes_per_ns=218.0,
    short_row_share=0.44,
    mma_sync_share=0.59,
    reserved_smem=1024,
    loads_beside_work=False,
)

# Not fitted: nobody has run this on an AMD GPU. Times are those of the H200, but for the start of a warp and the
# latency of a load, which with `busy_warps`, two for each of four matrix units, were chosen of a few values by shipped
# tables: docs/benchmarks/amd.md has how good the ranking is, there and on the other tables. Rates are NVIDIA's bytes a
# clock at the 2.1 GHz of an MI300X, whose compute unit reads at most 64 bytes a clock from its L2 and 128 from its LDS,
# as an SM does (AMD CDNA 3 white paper).
CDNA = GpuFamily(
    launch_us=5.8,
    block_start_us=0.8,
    warp_start_us=0.0,
    load_latency_us=0.5,
    step_us=0.078,
    scale_us=0.105,
    l2_gbs=92.0,
    store_gbs=67.0,
    busy_warps=8,
    lanes_per_ns=269.0,
    short_row_share=0.44,
    mma_sync_share=1.0,
    reserved_smem=0,
    loads_beside_work=True,
)

_NVIDIA_REGISTERS = 65536  # of a multiprocessor
_SIMDS = 4  # of a compute unit
_WAVE_REGISTERS = 512  # vector registers that the waves of one SIMD share, each 64 lanes wide
_MOST_WAVES = 8  # of one SIMD, since gfx90a


def family_of(gpu: Gpu) -> GpuFamily:
    """The family of a GPU."""
    return CDNA if gpu.target.is_amd else NVIDIA


def resident_blocks(num_warps: int, resources: Resources, gpu: Gpu) -> int:
    """How many blocks of so many warps one multiprocessor holds at once."""
    by_smem = gpu.smem_per_multiprocessor // max(1, resources.smem_bytes + family_of(gpu).reserved_smem)
    registers = -(-max(1, resources.registers) // 8) * 8
    if gpu.target.is_amd:
        waves = _SIMDS * min(_MOST_WAVES, _WAVE_REGISTERS // registers)
        return max(1, min(by_smem, waves // num_warps))
    by_warps = (64 if gpu.smem_per_multiprocessor > 128 * 1024 else 48) // num_warps
    return max(1, min(by_smem, _NVIDIA_REGISTERS // (registers * 32 * num_warps), by_warps))
