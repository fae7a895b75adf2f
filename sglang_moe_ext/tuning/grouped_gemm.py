"""Tune `kernels.grouped_gemm`: screen tiles at each number of rows, confirm the best against what runs today."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext import __version__
from sglang_moe_ext.core import CompileJob, CompileKey, Failure, Gpu, MoEExtError, MoEShape, Projection, TileConfig
from sglang_moe_ext.tables import config_table, grouped_gemm_table
from sglang_moe_ext.tables.grouped_gemm_table import GroupedGemmKey
from sglang_moe_ext.tuning.bench.grouped_gemm_bench import GroupedGemmSetup
from sglang_moe_ext.tuning.bench.messages import Measure, Pair
from sglang_moe_ext.tuning.bench.worker import BenchProcess
from sglang_moe_ext.tuning.compile.cache import CompileCache, default_path
from sglang_moe_ext.tuning.compile.kernel_source import grouped_gemm_source
from sglang_moe_ext.tuning.compile.pool import CompilePool
from sglang_moe_ext.tuning.request import Progress
from sglang_moe_ext.tuning.run import run_folder
from sglang_moe_ext.tuning.run.journal_reader import Circumstances
from sglang_moe_ext.tuning.search import candidates, cost_model, final_comparison, screening, space
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice
from sglang_moe_ext.tuning.search.screening import EFFORTS, Clean, Effort, EffortName
from sglang_moe_ext.tuning.versions import driver_version, version_of

DEFAULT_ROWS = tuple(2**power for power in range(12))
_ONE_BINARY = 16
"""The binaries do not change with the number of rows, so all jobs name the same."""


@dataclass(frozen=True, slots=True)
class GroupedGemmRequest:
    """What is tuned: b has the columns of the up GEMM of `shape`. `rows` of `a`, all experts together.

    `searches` False: only measure what runs today. `resume`: go on with the newest unfinished run, or that folder.
    """

    name: str
    shape: MoEShape
    gpu: Gpu
    rows: tuple[int, ...]
    effort: EffortName
    seed: int
    command: str
    output_dir: Path | None
    searches: bool = True
    resume: bool | Path = False

    @property
    def key(self) -> GroupedGemmKey:
        """The name of its table."""
        quantization = self.shape.quantization
        return GroupedGemmKey(self.shape.hidden_size, quantization.scheme or self.shape.dtype, quantization.block_shape)


def run(request: GroupedGemmRequest, progress: Progress) -> dict[int, MeasuredChoice[Pair]]:
    """The choice at each number of rows, measured on this machine's GPU.

    Raises:
        MoEExtError: nothing ran right, or the run's journal cannot be written.
    """
    source, circumstances = grouped_gemm_source(), _circumstances(request)
    with ExitStack() as ends:
        if request.resume:
            resumed = request.resume if isinstance(request.resume, Path) else None
            folder = ends.enter_context(run_folder.resume(circumstances, resumed))
        else:
            folder = ends.enter_context(run_folder.begin(circumstances))
        pool = ends.enter_context(
            CompilePool(
                source,
                cache=CompileCache(default_path()),
                triton_cache=folder.triton_cache,
                progress=lambda done, of: progress("compiling", done, of),
            )
        )
        worker = BenchProcess(GroupedGemmSetup(request.shape, request.seed, folder.triton_cache))
        ends.callback(worker.close)

        def clean(projection: Projection, key: CompileKey) -> Failure | None:
            job = CompileJob(request.shape, projection, _ONE_BINARY, key, request.gpu.target)
            return candidates.misfit(job, pool.result(job), request.gpu)

        if request.searches:
            keys = dict.fromkeys(
                key
                for m in sorted(request.rows, reverse=True)
                for key in screening.groups_by_key(list_tiles(request.shape, request.gpu, m, EFFORTS[request.effort]))
            )
            pool.want(CompileJob(request.shape, "up", _ONE_BINARY, key, request.gpu.target) for key in keys)
        found = choose_all(request, folder.journal.through(worker.measure), clean, progress)
        folder.finish()
    return found


def choose_all(
    request: GroupedGemmRequest, measure: Measure, clean: Clean, progress: Progress
) -> dict[int, MeasuredChoice[Pair]]:
    """The choice at each number of rows; those at which nothing ran right are left out.

    Raises:
        MoEExtError: that is so at all of them.
    """
    found: dict[int, MeasuredChoice[Pair]] = {}
    for done, rows in enumerate(sorted(request.rows, reverse=True)):
        progress("rows", done, len(request.rows))
        if (choice := _choose(request, rows, measure, clean)) is not None:
            found[rows] = choice
    progress("rows", len(request.rows), len(request.rows))
    if not found:
        raise MoEExtError(f"grouped_gemm ran right for no number of rows on {request.gpu.device_name}: -v says more")
    return dict(sorted(found.items()))


def _choose(request: GroupedGemmRequest, rows: int, measure: Measure, clean: Clean) -> MeasuredChoice[Pair] | None:
    effort, tiles, tried, failures = EFFORTS[request.effort], list[TileConfig](), 0, dict[str, int]()
    if request.searches:
        listed: candidates.Candidates = {"up": list_tiles(request.shape, request.gpu, rows, effort), "down": []}
        screened = screening.screen(rows, listed, effort, measure, clean)
        tried, failures, times = screened.tried, screened.failures, screened.times["up"]
        tiles = sorted(times, key=times.__getitem__)[: effort.finalists]
    return final_comparison.confirm(
        request.shape, rows, [_pair(tile) for tile in tiles], _pair(today(request, rows)), measure,
        rounds=effort.rounds, tried=tried, failures=failures,
    )  # fmt: skip


def list_tiles(shape: MoEShape, gpu: Gpu, rows: int, effort: Effort) -> list[TileConfig]:
    """The tiles of the binaries that the wave model puts first, with every GROUP_SIZE_M."""

    def estimate(tile: TileConfig) -> tuple[float, TileConfig]:
        return cost_model.gemm(tile, shape, gpu, rows, "up", cost_model.estimate(tile, shape, gpu)).us, tile

    ranked = screening.groups_by_key(sorted(space.prune(space.full_space(), shape, gpu).kept, key=estimate))
    return [key.with_group(group) for key in list(ranked)[: effort.keys] for group in ranked[key]]


def today(request: GroupedGemmRequest, rows: int) -> TileConfig:
    """What the function takes today: the nearest entry of its table, or its default."""
    from sglang_moe_ext.kernels import expert_gemm

    table = grouped_gemm_table.load(request.key, request.gpu.device_name, version_of("triton") or "")
    if table:
        return table[config_table.nearest(table, rows)]
    return expert_gemm.default_config(rows, request.shape.experts, request.key)


def _pair(tile: TileConfig) -> Pair:
    """As the requests to a bench want it; the GEMM is the up one."""
    return {"up": tile, "down": tile}


def _circumstances(request: GroupedGemmRequest) -> Circumstances:
    source = grouped_gemm_source()
    return {
        "shape": str(request.shape),
        "gpu": request.gpu.device_name,
        "kernel": source.name,
        "fingerprint": source.fingerprint,
        "torch": version_of("torch"),
        "driver": driver_version(),
        "seed": request.seed,
        "sglang_moe_ext": __version__,
    }
