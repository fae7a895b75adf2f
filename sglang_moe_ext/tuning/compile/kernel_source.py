"""What compiling is about: whose kernel, what became of each job, how far it is."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sglang_moe_ext.kernels
from sglang_moe_ext.core import CompileJob, EngineError, Failure, Resources
from sglang_moe_ext.engines.adapter import EngineAdapter, InstallationLike
from sglang_moe_ext.kernel_plans import SortedKernelJob

Job = CompileJob | SortedKernelJob
"""What a pool compiles: one binary of the engine's kernel, or the binaries of one half of a plan of our kernels."""
Compiled = dict[Job, Resources | Failure]
Progress = Callable[[int, int], None]
"""Called with how many binaries are done, of how many wanted so far; from the pool's own thread."""


@dataclass(frozen=True, slots=True)
class KernelSource:
    """Whose kernel it is. `module` has `warm_up()` and `compile_job(job)`; `fingerprint` changes with the kernel."""

    name: str
    module: str
    fingerprint: str
    is_engines_own: bool


def kernel_source(engine: InstallationLike | None, adapter: EngineAdapter) -> KernelSource:
    """The source for that installation of that engine; None: ours.

    Raises:
        EngineError: there is no Triton to compile with.
    """
    if importlib.util.find_spec("triton") is None:
        raise EngineError(
            f"no Triton is installed: expected it beside {adapter.TITLE}; `pip install triton` brings the compiler"
        )
    triton = importlib.metadata.version("triton")
    if engine is None:
        module = "sglang_moe_ext.kernels.fused_moe_compile"
        return KernelSource(f"our own kernel, Triton {triton}", module, f"{_digest_of_ours()} {triton}", False)
    text = adapter.kernel_file(engine).read_bytes()
    return KernelSource(
        f"{adapter.TITLE} {engine.version_text}'s own kernel, Triton {triton}",
        adapter.OFFLINE,
        f"{hashlib.sha256(text).hexdigest()} {triton}",
        True,
    )


def grouped_gemm_source() -> KernelSource:
    """Our `kernels.grouped_gemm`.

    Raises:
        EngineError: there is no Triton to compile with.
    """
    if importlib.util.find_spec("triton") is None:
        raise EngineError("no Triton is installed: grouped_gemm is compiled with it; `pip install triton` brings it")
    triton = importlib.metadata.version("triton")
    module = "sglang_moe_ext.kernels.expert_gemm_compile"
    return KernelSource(f"grouped_gemm, Triton {triton}", module, f"{digest_of_sorted_kernels()} {triton}", False)


def _digest_of_ours() -> str:
    return _digest("fused_moe*.py")


@functools.cache
def digest_of_sorted_kernels() -> str:
    """Changes with any file of our kernels, which share functions."""
    return _digest("*.py")


def _digest(pattern: str) -> str:
    folder = Path(sglang_moe_ext.kernels.__path__[0])
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob(pattern)))).hexdigest()
