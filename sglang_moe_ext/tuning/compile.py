"""The compile farm: make many binaries on all cores, know what each needs, and never make one twice."""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext.core import CompileJob, Failure, Resources
from sglang_moe_ext.tuning.compile_cache import CompileCache

log = logging.getLogger(__name__)

TIMEOUT_S = 120
"""One binary takes a second or so, a badly spilling one under twenty (measured, 2 cores, Triton 3.7.1, 2026-11-21)."""

Compiled = dict[CompileJob, Resources | Failure]
Progress = Callable[[int, int], None]
"""Called with how many binaries are done, of how many."""


@dataclass(frozen=True, slots=True)
class KernelSource:
    """Whose kernel it is. `module` has `warm_up()` and `compile_job(job)`; `fingerprint` changes with the kernel."""

    name: str
    module: str
    fingerprint: str
    is_engines_own: bool


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
    unique = list(dict.fromkeys(jobs))
    compiled: Compiled = {job: known for job in unique if (known := cache.get(source, job)) is not None}
    missing = [job for job in unique if triton_cache is not None or job not in compiled]
    done = len(unique) - len(missing)
    progress(done, len(unique))
    with tempfile.TemporaryDirectory(prefix="sglang_moe_ext-") as scratch:
        for job, result in _on_workers(source, missing, workers or os.cpu_count() or 1, triton_cache or Path(scratch)):
            compiled[job] = result
            if _is_worth_keeping(result):
                cache.put(source, job, result)
            done += 1
            progress(done, len(unique))
    return compiled


_REFUSALS = frozenset({"CompilationError", "OutOfResources", "UnsupportedLanguageConstruct", "MoEExtError"})
"""Failures that say something of the job; any other may be this machine's, and is tried again next time."""


def _is_worth_keeping(result: Resources | Failure) -> bool:
    return isinstance(result, Resources) or result.kind in _REFUSALS


def _on_workers(
    source: KernelSource, jobs: Sequence[CompileJob], workers: int, triton_cache: Path
) -> Iterator[tuple[CompileJob, Resources | Failure]]:
    waiting = list(jobs)
    alone = False  # after a crash, one at a time, so that the next one names its culprit
    while waiting:
        batch = waiting[:1] if alone else waiting
        try:
            with _pool(source, 1 if alone else min(workers, len(batch)), triton_cache) as pool:
                running = {pool.submit(_compile, source.module, job): job for job in batch}
                try:
                    for future in as_completed(running):
                        yield running[future], future.result()
                        waiting.remove(running[future])
                except (KeyboardInterrupt, GeneratorExit):
                    _abandon(pool)
                    raise
            alone = False
        except BrokenProcessPool:
            if alone:
                culprit = waiting.pop(0)
                log.warning("the compiler crashed or hung on %s: left out", culprit.key)
                yield culprit, Failure("Crash", f"the compiler died, or took longer than {TIMEOUT_S} s")
            alone = not alone or bool(waiting)


def _pool(source: KernelSource, workers: int, triton_cache: Path) -> ProcessPoolExecutor:
    """Workers forked from a process that has imported the kernel once: an import costs more than ten compilations."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sglang_moe_ext.tuning.compile_worker"])
    os.environ["SGLANG_MOE_EXT_PRELOAD"] = source.module
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(str(triton_cache),))


def _start(triton_cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = triton_cache
    os.setsid()  # Ctrl-C is the parent's to handle, and must not reach the assembler that a compilation runs


def _abandon(pool: ProcessPoolExecutor) -> None:
    """End the workers and what they run, without waiting for the queue."""
    workers = list(pool._processes)
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker, signal.SIGKILL)


def _compile(module: str, job: CompileJob) -> Resources | Failure:
    signal.alarm(TIMEOUT_S)  # its default action ends this process, wherever in native code it hangs
    try:
        answer: Resources | Failure = importlib.import_module(module).compile_job(job)
        return answer
    except Exception as error:  # noqa: BLE001 - a compiler fails in any way; each costs this job alone
        return Failure(type(error).__name__, (str(error).strip().splitlines() or ["no message"])[-1][:300])
    finally:
        signal.alarm(0)
