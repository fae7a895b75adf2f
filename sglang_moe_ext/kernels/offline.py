"""Compile our own kernel for a GPU that need not be here: what is asked for where no engine is installed."""

from __future__ import annotations

from sglang_moe_ext.core import CompileJob, Failure, Resources
from sglang_moe_ext.kernels.compiled import TargetOnlyDriver, resources_of


def warm_up() -> None:
    """Import what a compilation needs; a process that forks calls this once."""
    import sglang_moe_ext.kernels.fused_moe_signature  # noqa: F401


def compile_job(job: CompileJob) -> Resources | Failure:
    """What the job's binary needs, or why the compiler refuses it. One binary serves every batch size and group."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sglang_moe_ext.kernels.fused_moe_signature import compile_signature

    triton.runtime.driver.set_active(TargetOnlyDriver(job.sm))
    try:
        asked = compile_signature(job.shape, job.projection, job.key, job.sm)
        source = ASTSource(asked.fn, asked.signature, asked.constexprs, asked.attrs)
        return resources_of(triton.compile(source, target=GPUTarget("cuda", job.sm, 32), options=asked.options))
    except Exception as error:  # noqa: BLE001 - the compiler fails in many ways; each costs this candidate alone
        return Failure(type(error).__name__, (str(error).strip().splitlines() or ["no message"])[-1][:300])
