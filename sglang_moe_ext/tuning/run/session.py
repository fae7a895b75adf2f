"""A measuring run: its folder with the journal, its GPUs with their compile pool, and the results."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext import __version__
from sglang_moe_ext.core import EngineError, TileConfig
from sglang_moe_ext.engines.lookup_probe import LookupResult
from sglang_moe_ext.tuning.bench.gpu_bench import BenchSetup
from sglang_moe_ext.tuning.bench.worker import BenchProcess
from sglang_moe_ext.tuning.compile.cache import CompileCache, default_path
from sglang_moe_ext.tuning.compile.kernel_source import Job, KernelSource, kernel_source
from sglang_moe_ext.tuning.compile.pool import CompilePool
from sglang_moe_ext.tuning.incumbents import pairs_of
from sglang_moe_ext.tuning.request import MeasureOptions, Progress, TuneRequest
from sglang_moe_ext.tuning.run import ray_executor, run_folder, search_loop
from sglang_moe_ext.tuning.run.executor import BenchProcessLike, CompilePoolLike, Executor, LocalExecutor, close_all
from sglang_moe_ext.tuning.run.journal_reader import Circumstances
from sglang_moe_ext.tuning.run.run_folder import RunFolder
from sglang_moe_ext.tuning.run.search_loop import SearchResults
from sglang_moe_ext.tuning.search import candidates
from sglang_moe_ext.tuning.versions import driver_version, version_of

log = logging.getLogger(__name__)


def open_run(request: TuneRequest, measuring: MeasureOptions, source: KernelSource) -> RunFolder:
    """The run to go on with, or a new one.

    Raises:
        StoreError: there is none to go on with, or the disk refuses.
    """
    circumstances: Circumstances = {
        "shape": str(request.shape),
        "ep": request.shape.ep,
        "fused_shared": request.shape.fused_shared,
        "gpu": request.gpu.device_name,
        "kernel": source.name,
        "fingerprint": source.fingerprint,
        "torch": version_of("torch"),
        "driver": driver_version(),
        "routing": measuring.routing.name,
        "seed": request.seed,
        "sglang_moe_ext": __version__,
    }
    if measuring.resume:
        return run_folder.resume(circumstances, measuring.resume if isinstance(measuring.resume, Path) else None)
    interrupted = run_folder.unfinished(circumstances)
    if interrupted is not None:
        log.warning("an interrupted run of this layer lies in %s: --resume would go on with it", interrupted)
    return run_folder.begin(circumstances)


def measure(
    request: TuneRequest,
    measuring: MeasureOptions,
    run: RunFolder,
    kept: tuple[TileConfig, ...],
    ask_today: Callable[[], LookupResult],
    source: KernelSource,
    progress: Progress,
) -> SearchResults:
    """What was chosen for each M; `ask_today`: what the engine runs now.

    Raises:
        MoEExtError: nothing ran right, or no GPU answers.
    """
    tasks = search_loop.largest_first(
        {
            m: candidates.list_for_effort(
                kept, request.problem, m, effort=measuring.effort, with_tma=measuring.with_tma
            )
            for m in request.tokens
        }
    )
    jobs = [job for task in tasks for job in candidates.screening_jobs(task.listed, request.problem, task.tokens)]
    with ExitStack() as ends:
        executors = start_executors(request, measuring, source, run.triton_cache, jobs, ends, progress)
        return search_loop.measure_all(
            request,
            measuring,
            tasks,
            lambda: pairs_of(ask_today()),
            executors,
            run.journal,
            progress,
        )


def start_executors(
    request: TuneRequest,
    measuring: MeasureOptions,
    source: KernelSource,
    triton_cache: Path,
    jobs: Sequence[Job],
    ends: ExitStack,
    progress: Progress,
) -> list[Executor]:
    """The GPUs that the flags want, until `ends` is closed. Here, `jobs` begin to compile before the GPUs are ready.

    Raises:
        MoEExtError: there is no such GPU, or no such cluster.
    """
    if measuring.ray is not None:
        on_node = _OnNode(source, request, measuring)
        executors = ray_executor.ray_executors(measuring.ray or None, request.gpu.device_name, on_node)
    else:
        pool = ends.enter_context(
            CompilePool(
                source,
                cache=CompileCache(default_path()),
                triton_cache=triton_cache,
                progress=lambda done, of: progress("compiling", done, of),
            )
        )
        pool.want(jobs)
        setup = BenchSetup(request.shape, measuring.routing, request.seed, triton_cache, request.engine)
        workers = {gpu: BenchProcess(setup, {"CUDA_VISIBLE_DEVICES": gpu}) for gpu in measuring.gpus}
        executors = [LocalExecutor(f"GPU {gpu}", pool, worker) for gpu, worker in workers.items()]
    ends.callback(close_all, executors)
    return executors


@dataclass(frozen=True, slots=True)
class _OnNode:
    """What a node of a cluster makes for one of its GPUs; Ray has set CUDA_VISIBLE_DEVICES there."""

    source: KernelSource
    request: TuneRequest
    measuring: MeasureOptions

    def __call__(self, cores: int, scratch: Path) -> tuple[CompilePoolLike, BenchProcessLike]:
        """Raises EngineError where the node has another kernel: its times would say nothing of ours."""
        adapter = self.request.adapter
        there = kernel_source(adapter.find(), adapter)
        if there.fingerprint != self.source.fingerprint:
            raise EngineError(f"it has {there.name}: expected the very {self.source.name} that is here")
        setup = BenchSetup(self.request.shape, self.measuring.routing, self.request.seed, scratch, self.request.engine)
        pool = CompilePool(self.source, cache=CompileCache(default_path()), triton_cache=scratch, workers=cores)
        return pool, BenchProcess(setup)
