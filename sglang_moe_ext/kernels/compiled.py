"""What a compiled Triton kernel needs from a GPU, read from its binary; and a driver that compiles without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from sglang_moe_ext.core import Resources

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


class TargetOnlyDriver:
    """As much of Triton's driver as a compilation asks for: which GPU to compile for."""

    def __init__(self, sm: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", sm, 32)

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
    """Of a triton CompiledKernel. Spills are the stack frame: the kernels that we compile keep nothing else there.

    Read with the cuobjdump that Triton's wheel carries, since Triton itself asks the driver, and there may be none.
    """
    import triton.backends.nvidia

    cuobjdump = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(kernel.asm["cubin"])
        binary.flush()
        said = subprocess.run([cuobjdump, "-res-usage", binary.name], capture_output=True, text=True, check=False)
    match = _USAGE.search(said.stdout + said.stderr)
    if match is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {(said.stdout + said.stderr).strip()[:200]}")
    return Resources(smem_bytes=int(kernel.metadata.shared), registers=int(match[1]), spill_bytes=int(match[2]))
