"""Compile a list of jobs, and wait for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sglang_moe_ext.core import CompileJob
from sglang_moe_ext.tuning.binaries import Compiled, KernelSource, Progress
from sglang_moe_ext.tuning.compile_cache import CompileCache
from sglang_moe_ext.tuning.farm import Farm


def compile_all(
    source: KernelSource,
    jobs: Sequence[CompileJob],
    *,
    cache: CompileCache,
    workers: int | None = None,
    triton_cache: Path | None = None,
    progress: Progress = lambda done, of: None,
) -> Compiled:
    """Compile each job, those in the cache for free. A crash, a hang or an error costs the job that caused it alone.

    `triton_cache`: where Triton keeps the binaries, for a process that will launch them; None: thrown away.
    """
    with Farm(source, cache=cache, triton_cache=triton_cache, workers=workers, progress=progress) as farm:
        farm.want(jobs)
        return {job: farm.result(job) for job in jobs}
