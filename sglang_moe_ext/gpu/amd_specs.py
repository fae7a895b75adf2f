"""Facts about AMD's data centre GPUs, CDNA 2 to 4, whose compute units stand for multiprocessors and LDS for memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sglang_moe_ext.core import Gpu, GpuError, Target

KIB = 1024


@dataclass(frozen=True, slots=True)
class CdnaArchitecture:
    """LDS of a compute unit in bytes, all of which one workgroup may have; dense operations of its matrix units.

    `operations` a clock are with operands of 16 bits, and twice as many with 8-bit floats where it `has_fp8`.
    """

    lds_bytes: int
    operations: int
    has_fp8: bool = True


# LDS: ROCm documentation, "AMD GPU specifications". Operations: AMD on CDNA 3 and 4 at ISSCC 2026 (4,096 and 8,192 of
# 8-bit floats); of CDNA 2 those that make the 383 TFLOP/s of an MI250X.
CDNA = {
    "gfx90a": CdnaArchitecture(64 * KIB, 1024, has_fp8=False),
    "gfx942": CdnaArchitecture(64 * KIB, 2048),
    "gfx950": CdnaArchitecture(160 * KIB, 4096),
}

_SHEET = (
    "units, caches and memory: ROCm's table of GPU specifications; dense rates: operations of a unit in a clock, times "
    "units and peak clock"
)


@dataclass(frozen=True, slots=True)
class AmdFacts:
    """One GPU as torch sees it: of an MI250X one of its two dies.

    `dies` (XCDs) have `l2_mib` of L2 together, each for its own compute units; `cache_mib` is the cache of the memory
    that all of them share, 0 where there is none. The peak clock is AMD's (of CDNA 4 as stated at Hot Chips 2025).
    """

    gfx: str
    compute_units: int
    dies: int
    bandwidth_gbs: float
    peak_ghz: float
    l2_mib: float
    cache_mib: float
    memory_gib: float
    source: str = _SHEET
    other_names: tuple[str, ...] = ()

    @property
    def bf16_tflops(self) -> float:
        """Dense rate of all units at the peak clock."""
        return CDNA[self.gfx].operations * self.compute_units * self.peak_ghz / 1000


# Device name as torch.cuda reports it. `other_names`: what amdsmi of some releases says instead, which is vLLM's name
# where it has no own one for the device (`_ROCM_DEVICE_ID_NAME_MAP` of its platforms/rocm.py); the engines ship tables
# under these names too.
FACTS: dict[str, AmdFacts] = {
    "AMD Instinct MI250X": AmdFacts(
        "gfx90a", 110, 1, 1638, 1.7, 8, 0, 64, f"one of its two dies; {_SHEET}"
    ),
    "AMD Instinct MI300X": AmdFacts(
        "gfx942", 304, 8, 5325, 2.1, 32, 256, 192,
        other_names=("AMD Instinct MI300X OAM", "AMD Instinct MI300X HF"),
    ),
    "AMD Instinct MI308X": AmdFacts(
        "gfx942", 80, 4, 5325, 2.1, 16, 256, 192,
        "no public sheet: 80 compute units as its users report, the clock and memory of an MI300X",
    ),
    "AMD Instinct MI325X": AmdFacts(
        "gfx942", 304, 8, 6000, 2.1, 32, 256, 256, other_names=("AMD Instinct MI325 OAM",)
    ),
    "AMD Instinct MI350X": AmdFacts(
        "gfx950", 256, 8, 8000, 2.2, 32, 256, 288, other_names=("AMD Instinct MI350 OAM",)
    ),
    "AMD Instinct MI355X": AmdFacts(
        "gfx950", 256, 8, 8000, 2.4, 32, 256, 288, other_names=("AMD Instinct MI355 OAM",)
    ),
}  # fmt: skip


def _gpu(device_name: str, facts: AmdFacts) -> Gpu:
    lds_bytes = CDNA[facts.gfx].lds_bytes
    return Gpu(
        device_name=device_name,
        target=Target(gfx=facts.gfx),
        multiprocessors=facts.compute_units,
        smem_per_block=lds_bytes,
        smem_per_multiprocessor=lds_bytes,
        bandwidth_gbs=facts.bandwidth_gbs,
        bf16_tflops=facts.bf16_tflops,
        fp8_tflops=2 * facts.bf16_tflops if CDNA[facts.gfx].has_fp8 else None,
        l2_mib=facts.cache_mib or facts.l2_mib,
        source=facts.source,
        memory_gib=facts.memory_gib,
    )


def known_gpus() -> dict[str, Gpu]:
    """Every AMD GPU of the table, under each of its names. `l2_mib` is the last cache that all its units share."""
    return {name: _gpu(name, facts) for first, facts in FACTS.items() for name in (first, *facts.other_names)}


def names_of(device_name: str) -> tuple[str, ...]:
    """All names of that GPU, the one that torch reports first; none of an unknown GPU."""
    for first, facts in FACTS.items():
        if device_name in (names := (first, *facts.other_names)):
            return names
    return ()


def describe(device_name: str, gfx: str, properties: object) -> Gpu:
    """The GPU of that name; a partition of it, or one that is not in the table, with rates scaled by its units.

    Raises:
        GpuError: the architecture is not in the table.
    """
    known = known_gpus()
    relatives = [gpu for gpu in known.values() if gpu.target.gfx == gfx]
    relative = known.get(device_name) or (relatives[0] if relatives else None)
    if relative is None:
        raise GpuError(f"{device_name!r} is a {gfx}: expected one of {', '.join(CDNA)}")
    units = int(getattr(properties, "multi_processor_count", relative.multiprocessors))
    if device_name in known and units == relative.multiprocessors:
        return relative
    scale = units / relative.multiprocessors
    memory = getattr(properties, "total_memory", None)
    return replace(
        relative,
        device_name=device_name,
        multiprocessors=units,
        bandwidth_gbs=relative.bandwidth_gbs * scale,
        bf16_tflops=relative.bf16_tflops * scale,
        fp8_tflops=None if relative.fp8_tflops is None else relative.fp8_tflops * scale,
        l2_mib=relative.l2_mib * scale,
        source=f"units from the driver, rates scaled from {relative.device_name} by units",
        memory_gib=None if memory is None else memory / KIB**3,
    )
