"""Measure every batch size on the GPU of this machine: compile the shortlists, start a worker, choose for each M."""

from __future__ import annotations

import tempfile
from pathlib import Path

from sglang_moe_ext.core import MoEExtError, TileConfig
from sglang_moe_ext.tuning import measured, plan, predict
from sglang_moe_ext.tuning.compile import Compiled, KernelSource, compile_all
from sglang_moe_ext.tuning.compile_cache import CompileCache, default_path
from sglang_moe_ext.tuning.measured import TOLERATED_ERROR, Measured
from sglang_moe_ext.tuning.plan import Plan
from sglang_moe_ext.tuning.request import Progress, Request
from sglang_moe_ext.tuning.worker import Pair, Setup, Worker


def measure_all(
    request: Request, incumbents: dict[int, Pair], made: Plan, source: KernelSource, progress: Progress
) -> dict[int, Measured]:
    """What was chosen for each M.

    Raises:
        MoEExtError: the scheme cannot be measured yet, or the worker does not start.
    """
    scheme = request.shape.quantisation.scheme
    if scheme not in TOLERATED_ERROR:
        raise MoEExtError(f"{scheme} weights cannot be measured yet: --predict makes a table from the model alone")
    lists = {m: plan.shortlist(made.sifted.kept, request.shape, request.gpu, m) for m in request.tokens}
    with tempfile.TemporaryDirectory(prefix="sglang_moe_ext-triton-") as triton_cache:
        compiled = _compiled(request, lists, incumbents, source, Path(triton_cache), progress)
        worker = Worker(Setup(request.shape, request.seed, Path(triton_cache)))
        try:
            results: dict[int, Measured] = {}
            for done, m in enumerate(request.tokens):
                progress("measuring", done, len(request.tokens))
                runnable = [config for config in lists[m] if _is_clean(request, config, m, compiled)]
                choice = measured.choose(request.shape, m, runnable, incumbents[m], worker.ask)
                if choice is not None:
                    results[m] = choice
            progress("measuring", len(request.tokens), len(request.tokens))
            if not results:
                raise MoEExtError(f"nothing ran right on {request.gpu.device_name} for any batch size: see -v for why")
            return results
        finally:
            worker.close()


def _compiled(
    request: Request,
    lists: dict[int, list[TileConfig]],
    incumbents: dict[int, Pair],
    source: KernelSource,
    triton_cache: Path,
    progress: Progress,
) -> Compiled:
    """The binaries of all shortlists and incumbents, left where the worker's Triton finds them."""
    jobs = [
        job
        for m, configs in lists.items()
        for config in (*configs, *incumbents[m].values())
        for job in predict.jobs_of(config, request.shape, m, request.gpu.sm).values()
    ]
    return compile_all(
        source,
        jobs,
        cache=CompileCache(default_path()),
        triton_cache=triton_cache,
        progress=lambda done, of: progress("compiling", done, of),
    )


def _is_clean(request: Request, config: TileConfig, tokens: int, compiled: Compiled) -> bool:
    jobs = predict.jobs_of(config, request.shape, tokens, request.gpu.sm)
    return predict.clean_resources(jobs, compiled, request.gpu) is not None
