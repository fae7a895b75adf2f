"""MIG slices: a part of a GPU with the limits of the whole, and a name and multiprocessors of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from sglang_moe_ext.core import Gpu, GpuError

_SUFFIX = re.compile(r"[\s_]+MIG[\s_]+(?P<profile>(?P<slices>[1-7])g\.(?P<gib>\d{1,3})gb)(?:\+\S+)?\s*$", re.IGNORECASE)
_MEMORY_SLICES = 8

# Multiprocessors by number of compute slices, as the driver lists them for a full-size part of the architecture
# (NVIDIA MIG User Guide: `nvidia-smi mig -lgip` of A100 and of H100).
_MULTIPROCESSORS = {
    (80, 108): {1: 14, 2: 28, 3: 42, 4: 56, 7: 98},
    (80, 56): {1: 14, 2: 28, 4: 56},
    (90, 132): {1: 16, 2: 32, 3: 60, 4: 64, 7: 132},
}


@dataclass(frozen=True, slots=True)
class MigProfile:
    """A profile such as 3g.40gb: compute slices, and memory in GiB."""

    name: str
    slices: int
    memory_gib: int


def split(name: str) -> tuple[str, MigProfile | None]:
    """(The name of the whole GPU, the profile that is named behind it)."""
    match = _SUFFIX.search(name)
    if match is None:
        return name, None
    return name[: match.start()], MigProfile(match["profile"].lower(), int(match["slices"]), int(match["gib"]))


def slice_of(whole: Gpu, profile: MigProfile) -> Gpu:
    """That slice of the GPU. Rates scale with multiprocessors, bandwidth and L2 with memory slices (eighths).

    Raises:
        GpuError: the GPU has less memory than the profile.
    """
    memory = whole.memory_gib
    if memory is None or profile.memory_gib > memory:
        raise GpuError(
            f"{whole.device_name} has {memory or 'an unknown number of'} GiB: no MIG profile {profile.name}; "
            "expected one that `nvidia-smi mig -lgip` lists"
        )
    listed = _MULTIPROCESSORS.get((whole.sm, whole.multiprocessors), {}).get(profile.slices)
    multiprocessors = listed or whole.multiprocessors * profile.slices // _MEMORY_SLICES
    compute = multiprocessors / whole.multiprocessors
    eighths = max(1, round(_MEMORY_SLICES * profile.memory_gib / memory)) / _MEMORY_SLICES
    known = "as the driver lists it" if listed else "a guess: eighths of the whole"
    return replace(
        whole,
        device_name=f"{whole.device_name} MIG {profile.name}",
        multiprocessors=multiprocessors,
        bandwidth_gbs=whole.bandwidth_gbs * eighths,
        bf16_tflops=whole.bf16_tflops * compute,
        fp8_tflops=None if whole.fp8_tflops is None else whole.fp8_tflops * compute,
        l2_mib=whole.l2_mib * eighths,
        memory_gib=float(profile.memory_gib),
        source=f"MIG slice of {whole.device_name} ({multiprocessors} multiprocessors, {known}); {whole.source}",
    )
