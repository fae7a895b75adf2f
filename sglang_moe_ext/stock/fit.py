"""Whether the entries of a table run, and run right, on a GPU: by the rules, and by the compiler where there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sglang_moe_ext.core import CompileJob, Gpu, MoEShape, Projection, Table, TileConfig
from sglang_moe_ext.engines.adapter import EngineAdapter
from sglang_moe_ext.engines.sglang import support
from sglang_moe_ext.gpu.shared_memory import smem_bytes
from sglang_moe_ext.serving.guard import degrade
from sglang_moe_ext.tuning.compile.cache import CompileCache, default_path
from sglang_moe_ext.tuning.compile.kernel_source import kernel_source
from sglang_moe_ext.tuning.compile.pool import compile_all
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.search import candidates


@dataclass(frozen=True, slots=True)
class EntryProblem:
    """What is wrong with one entry of a table."""

    tokens: int
    config: TileConfig
    why: str


def check_by_rule(
    table: Table, shape: MoEShape, gpu: Gpu, projection: Projection, adapter: EngineAdapter
) -> list[EntryProblem]:
    """The entries that the GPU cannot run, or with which the engine's kernel computes wrong results."""
    found = ((m, config, _why_not(config, shape, gpu, projection, adapter)) for m, config in table.items())
    return [EntryProblem(m, config, why) for m, config, why in found if why is not None]


def _why_not(
    config: TileConfig, shape: MoEShape, gpu: Gpu, projection: Projection, adapter: EngineAdapter
) -> str | None:
    runs = adapter.effective_config(config, shape.quantization)
    block = shape.quantization.block_shape
    if shape.quantization.is_block_wise and block is not None and block[1] % runs.block_k:
        return f"BLOCK_SIZE_K {runs.block_k} does not lie within one block of {block[1]} scales: wrong results"
    if runs.use_tma and projection == "down" and not support.down_tma_is_right(shape.quantization):
        return f"USE_TMA in a table for the down projection computes wrong results with {shape.quantization}"
    asked = smem_bytes(runs, shape, gpu.sm)
    if asked <= gpu.smem_per_block:
        return None
    fitted = next((it for it in degrade(runs) if smem_bytes(it, shape, gpu.sm) <= gpu.smem_per_block), None)
    advice = "no smaller tile fits" if fitted is None else f"the plugin would run {fitted}, the engine alone would end"
    return f"asks for {asked} B of shared memory, and a block has {gpu.smem_per_block} B: {advice}"


def check_by_compiler(
    table: Table,
    shape: MoEShape,
    gpu: Gpu,
    projection: Projection,
    adapter: EngineAdapter,
    progress: Callable[[int, int], None],
) -> list[EntryProblem]:
    """The entries that do not compile, or whose binaries do not fit the GPU.

    Raises:
        EngineError: there is no Triton to compile with.
    """
    source = kernel_source(adapter.find(), adapter)
    jobs = {m: _jobs(config, shape, m, gpu, projection, adapter) for m, config in table.items()}
    wanted = list(dict.fromkeys(job for of_m in jobs.values() for job in of_m))
    needs = compile_all(source, wanted, cache=CompileCache(default_path()), progress=progress)
    problems: list[EntryProblem] = []
    for m, of_m in jobs.items():
        misfits = (candidates.misfit(job, needs[job], gpu) for job in of_m)
        first = next((misfit for misfit in misfits if misfit is not None), None)
        if first is not None:
            problems.append(EntryProblem(m, table[m], f"{first.kind}: {' '.join(first.message.split())[:200]}"))
    return problems


def _jobs(
    config: TileConfig, shape: MoEShape, tokens: int, gpu: Gpu, projection: Projection, adapter: EngineAdapter
) -> Sequence[CompileJob]:
    """The binaries of one entry: of both GEMMs where one configuration serves both."""
    runs = adapter.effective_config(config, shape.quantization)
    pair = candidates.pair_jobs({"up": runs, "down": runs}, Problem(shape, gpu, adapter.NAME), tokens)
    return pair if not adapter.HAS_DOWN_TABLES else [job for job in pair if job.projection == projection]
