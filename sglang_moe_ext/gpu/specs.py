"""Facts of each GPU that a plan needs without having it: shared memory, multiprocessors, bandwidth, rates."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from sglang_moe_ext.core import Gpu, GpuError

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

# device name as torch.cuda reports it: (sm, multiprocessors, GB/s, bf16 TFLOP/s, fp8 TFLOP/s, L2 MiB, source).
# Dense rates with float32 accumulation. "datasheet": the figures of the vendor's public sheets as we remember them, not
# checked against them since; they rank predictions, and no limit of a kernel depends on them.
_FACTS: dict[str, tuple[int, int, float, float, float | None, float, str]] = {
    "NVIDIA A100-SXM4-80GB": (80, 108, 2039, 312, None, 40, "datasheet"),
    "NVIDIA A100-SXM4-40GB": (80, 108, 1555, 312, None, 40, "datasheet"),
    "NVIDIA A100 80GB PCIe": (80, 108, 1935, 312, None, 40, "datasheet"),
    "NVIDIA A100-PCIE-40GB": (80, 108, 1555, 312, None, 40, "datasheet"),
    "NVIDIA A800-SXM4-80GB": (80, 108, 2039, 312, None, 40, "datasheet"),
    "NVIDIA GeForce RTX 3090": (86, 82, 936, 71, None, 6, "datasheet"),
    "NVIDIA RTX A6000": (86, 84, 768, 155, None, 6, "datasheet"),
    "NVIDIA A10": (86, 72, 600, 125, None, 6, "datasheet"),
    "NVIDIA GeForce RTX 4090": (89, 128, 1008, 165, 330, 72, "datasheet"),
    "NVIDIA GeForce RTX 4090 D": (89, 114, 1008, 147, 294, 72, "datasheet"),
    "NVIDIA RTX 6000 Ada Generation": (89, 142, 960, 364, 728, 96, "datasheet"),
    "NVIDIA L40S": (89, 142, 864, 362, 733, 96, "datasheet"),
    "NVIDIA L40": (89, 142, 864, 181, 362, 96, "datasheet"),
    "NVIDIA L4": (89, 58, 300, 121, 242, 48, "datasheet"),
    "NVIDIA H100 80GB HBM3": (90, 132, 3352, 989, 1979, 50, "datasheet"),
    "NVIDIA H100 PCIe": (90, 114, 2039, 756, 1513, 50, "datasheet"),
    "NVIDIA H100 NVL": (90, 132, 3938, 835, 1671, 50, "datasheet"),
    "NVIDIA H800": (90, 132, 3352, 989, 1979, 50, "datasheet"),
    "NVIDIA H20": (90, 78, 4000, 148, 296, 60, "datasheet"),
    "NVIDIA H20-3e": (90, 78, 4800, 148, 296, 60, "datasheet"),
    "NVIDIA H200": (90, 132, 4300, 790, 1500, 60, _MEASURED),
    "NVIDIA H200 NVL": (90, 132, 4800, 835, 1671, 60, "datasheet"),
    "NVIDIA GH200 480GB": (90, 132, 4000, 989, 1979, 60, "datasheet"),
    "NVIDIA B200": (100, 148, 8000, 2250, 4500, 126, "datasheet"),
    "NVIDIA GB200": (100, 148, 8000, 2500, 5000, 126, "datasheet"),
    "NVIDIA B300 SXM6 AC": (103, 148, 8000, 2250, 4500, 126, "datasheet"),
    "NVIDIA GB300": (103, 148, 8000, 2500, 5000, 126, "datasheet"),
    "NVIDIA GeForce RTX 5090": (120, 170, 1792, 210, 419, 96, "datasheet"),
    "NVIDIA GeForce RTX 5080": (120, 84, 960, 113, 225, 64, "datasheet"),
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": (120, 188, 1597, 504, 1008, 128, "datasheet"),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": (120, 188, 1792, 504, 1008, 128, "datasheet"),
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": (120, 188, 1792, 438, 877, 128, "datasheet"),
    "NVIDIA GB10": (121, 48, 273, 125, 250, 24, "datasheet"),
}

# What people write for the most common part of a family.
_ALIASES = {
    "A100": "NVIDIA A100-SXM4-80GB",
    "A800": "NVIDIA A800-SXM4-80GB",
    "H100": "NVIDIA H100 80GB HBM3",
    "GH200": "NVIDIA GH200 480GB",
    "B300": "NVIDIA B300 SXM6 AC",
    "RTX 6000 Ada": "NVIDIA RTX 6000 Ada Generation",
    "RTX PRO 6000": "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
    "DGX Spark": "NVIDIA GB10",
}


def _gpu(device_name: str) -> Gpu:
    sm, multiprocessors, bandwidth, bf16, fp8, l2, source = _FACTS[device_name]
    architecture = ARCHITECTURES[sm]
    return Gpu(
        device_name=device_name,
        sm=sm,
        multiprocessors=multiprocessors,
        smem_per_block=architecture.smem_per_block,
        smem_per_multiprocessor=architecture.smem_per_multiprocessor,
        bandwidth_gbs=bandwidth,
        bf16_tflops=bf16,
        fp8_tflops=fp8,
        l2_mib=l2,
        source=source,
    )


def known_gpus() -> dict[str, Gpu]:
    """Every GPU we have facts of, by its device name."""
    return {name: _gpu(name) for name in _FACTS}


def _plain(name: str) -> str:
    """RTX_4090, rtx-4090 and "NVIDIA GeForce RTX 4090" are one name."""
    words = re.sub(r"[\s_\-/]+", " ", name.lower()).strip()
    return re.sub(r"\b(nvidia|geforce)\b ?", "", words).strip()


def find(name: str) -> Gpu:
    """The GPU that `name` means: a device name, its file-name form, or a short name such as RTX_4090 or H200.

    Raises:
        GpuError: no such GPU is known; the message names the closest ones.
    """
    by_plain = {_plain(full): full for full in _FACTS} | {_plain(alias): full for alias, full in _ALIASES.items()}
    full = by_plain.get(_plain(name))
    if full is None:
        close = difflib.get_close_matches(_plain(name), by_plain, n=3, cutoff=0.4)
        names = ", ".join(dict.fromkeys(by_plain[plain].replace(" ", "_") for plain in close)) or "H200, RTX_4090, A100"
        raise GpuError(f"unknown GPU {name!r}: expected the name that torch.cuda reports, such as {names}")
    return _gpu(full)


_VARIANT = re.compile(r"( NVL|-3e| D| MIG .*)$")


def aliases(gpu: Gpu) -> list[str]:
    """Known parts on which the same kernels are fast: same base name, limits, multiprocessors and architecture."""
    base = _VARIANT.sub("", gpu.device_name)
    return [
        other.device_name
        for other in known_gpus().values()
        if other.device_name != gpu.device_name
        and _VARIANT.sub("", other.device_name) == base
        and (other.sm, other.multiprocessors, other.smem_per_block) == (gpu.sm, gpu.multiprocessors, gpu.smem_per_block)
    ]


def detect() -> Gpu | None:
    """The first GPU of this machine, or None where torch is missing or sees none. Initializes CUDA."""
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


def describe(device_name: str, properties: object) -> Gpu:
    """A GPU that the table lacks: limits as the driver states them, rates scaled from a part of its family.

    Raises:
        GpuError: its compute capability is one that nothing is known about.
    """
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
        sm=sm,
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
    )
