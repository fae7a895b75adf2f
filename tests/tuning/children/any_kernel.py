"""A kernel module for the compile pool: every binary fits, but those of BLOCK_SIZE_N 256."""

from __future__ import annotations

from sglang_moe_ext.core import CompileJob, Failure, Resources


def warm_up() -> None:
    pass


def compile_job(job: CompileJob) -> Resources | Failure:
    if job.key.block_n == 256:
        return Failure("CompilationError", "refused")
    return Resources(smem_bytes=65536, registers=128, spill_bytes=0)
