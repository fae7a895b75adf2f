"""What a compiled Triton kernel needs from a GPU, read from its binary; and a driver that compiles without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from sglang_moe_ext.core import Resources, Target

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_VGPRS, _SCRATCH = "vgpr_count", "private_segment_fixed_size"


def triton_target(target: Target) -> Any:
    """The same, as Triton names it."""
    from triton.backends.compiler import GPUTarget

    if target.is_amd:
        return GPUTarget("hip", target.gfx, target.lanes)
    return GPUTarget("cuda", target.sm, target.lanes)


class TargetOnlyDriver:
    """As much of Triton's driver as a compilation asks for: which GPU to compile for."""

    def __init__(self, target: Target) -> None:
        self._target = triton_target(target)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def resources_of(kernel: Any) -> Resources:
    """Of a triton CompiledKernel. Spills are the stack frame: the kernels that we compile keep nothing else there."""
    smem_bytes = int(kernel.metadata.shared)
    if "amdgcn" in kernel.asm:
        return _resources_on_amd(smem_bytes, kernel.asm["amdgcn"])
    return _resources_on_nvidia(smem_bytes, kernel.asm["cubin"])


_AMD_NOTES = {name: re.compile(rf"^\s*\.{name}:\s+(\d+)$", re.MULTILINE) for name in (_VGPRS, _SCRATCH)}


def _resources_on_amd(smem_bytes: int, assembly: str) -> Resources:
    """From the notes that LLVM leaves in the assembly. Its count of vector registers has the accumulation ones in it.

    A spilled scalar register goes to a lane of a vector register, and is no memory.
    """
    found = {name: pattern.search(assembly) for name, pattern in _AMD_NOTES.items()}
    registers, scratch = found[_VGPRS], found[_SCRATCH]
    if registers is None or scratch is None:
        raise RuntimeError(f"the assembly has no notes {_VGPRS} and {_SCRATCH}: expected LLVM's for AMD GPUs")
    return Resources(smem_bytes=smem_bytes, registers=int(registers[1]), spill_bytes=int(scratch[1]))


def _resources_on_nvidia(smem_bytes: int, cubin: bytes) -> Resources:
    """Read with the cuobjdump in Triton's wheel, since Triton itself asks the driver, and there may be none."""
    import triton.backends.nvidia

    cuobjdump = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(cubin)
        binary.flush()
        said = subprocess.run([cuobjdump, "-res-usage", binary.name], capture_output=True, text=True, check=False)
    match = _USAGE.search(said.stdout + said.stderr)
    if match is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {(said.stdout + said.stderr).strip()[:200]}")
    return Resources(smem_bytes=smem_bytes, registers=int(match[1]), spill_bytes=int(match[2]))
