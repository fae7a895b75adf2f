"""A measuring run: its folder with the journal, its GPUs with a compile farm beside them, and what they find."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext import __version__
from sglang_moe_ext.core import TileConfig
from sglang_moe_ext.engines.sglang import lookup
from sglang_moe_ext.tuning import candidates, fleet, on_gpu, pickup, ray_fleet, runs
from sglang_moe_ext.tuning.bench import Setup
from sglang_moe_ext.tuning.compile import Farm, KernelSource
from sglang_moe_ext.tuning.compile_cache import CompileCache, default_path
from sglang_moe_ext.tuning.on_gpu import Task
from sglang_moe_ext.tuning.recording import Circumstances
from sglang_moe_ext.tuning.records import driver_version, version_of
from sglang_moe_ext.tuning.rematch import Measured
from sglang_moe_ext.tuning.request import Measuring, Progress, Request
from sglang_moe_ext.tuning.runs import Run
from sglang_moe_ext.tuning.station import FarmLike, LocalStation, Station, WorkerLike
from sglang_moe_ext.tuning.worker import Worker


def opened(request: Request, measuring: Measuring, source: KernelSource) -> Run:
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
        return runs.resumed(circumstances, measuring.resume if isinstance(measuring.resume, Path) else None)
    return runs.begin(circumstances)


def results(
    request: Request,
    measuring: Measuring,
    run: Run,
    kept: tuple[TileConfig, ...],
    today: lookup.Asked,
    source: KernelSource,
    progress: Progress,
) -> dict[int, Measured]:
    """What was chosen for each M; `today` says what the engine runs now.

    Raises:
        MoEExtError: nothing ran right, or no GPU answers.
    """
    tasks = on_gpu.largest_first({m: candidates.of_request(request, measuring, kept, m) for m in request.tokens})
    with ExitStack() as ends:
        if measuring.ray is None:
            stations = _local(request, measuring, run, tasks, source, ends, progress)
        else:
            stations = ray_fleet.stations(
                measuring.ray or None, request.gpu.device_name, _OnNode(source, request, measuring)
            )
        ends.callback(fleet.close_all, stations)
        return on_gpu.measure_all(
            request,
            measuring,
            tasks,
            lambda: pickup.pairs_of(today.answer(pickup.question(request))),
            stations,
            run.journal,
            progress,
        )


def _local(
    request: Request,
    measuring: Measuring,
    run: Run,
    tasks: Sequence[Task],
    source: KernelSource,
    ends: ExitStack,
    progress: Progress,
) -> list[Station]:
    """The GPUs of this machine; all that they will want is queued at once, in the order of the tasks."""
    farm = ends.enter_context(
        Farm(
            source,
            cache=CompileCache(default_path()),
            triton_cache=run.triton_cache,
            progress=lambda done, of: progress("compiling", done, of),
        )
    )
    for task in tasks:
        farm.want(candidates.screening_jobs(task.listed, request.shape, task.tokens, request.gpu.sm))
    setup = Setup(request.shape, measuring.routing, request.seed, run.triton_cache)
    return [LocalStation(f"GPU {gpu}", farm, Worker(setup, {"CUDA_VISIBLE_DEVICES": gpu})) for gpu in measuring.gpus]


@dataclass(frozen=True, slots=True)
class _OnNode:
    """What a node of a cluster makes for one of its GPUs; Ray has set CUDA_VISIBLE_DEVICES there."""

    source: KernelSource
    request: Request
    measuring: Measuring

    def __call__(self, cores: int, scratch: Path) -> tuple[FarmLike, WorkerLike]:
        setup = Setup(self.request.shape, self.measuring.routing, self.request.seed, scratch)
        farm = Farm(self.source, cache=CompileCache(default_path()), triton_cache=scratch, workers=cores)
        return farm, Worker(setup)
