"""Whether the entries of a table run, and run right, on a GPU: by the rules, and by the compiler where there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sglang_moe_ext.core import CompileJob, Projection, Table, TileConfig
from sglang_moe_ext.engines import launch_rules
from sglang_moe_ext.engines.launch_rules import KernelLaunch, LaunchRule, RuledConfig
from sglang_moe_ext.engines.sglang import support as sglang_support
from sglang_moe_ext.engines.vllm import support as vllm_support
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


def check_by_rule(table: Table, problem: Problem, projection: Projection) -> list[EntryProblem]:
    """The entries that the GPU cannot run, or with which the engine's kernel computes wrong results."""
    found = ((m, config, _why_not(config, problem, projection)) for m, config in table.items())
    return [EntryProblem(m, config, why) for m, config, why in found if why is not None]


_NEWEST = {"sglang": sglang_support.NEWEST, "vllm": vllm_support.NEWEST}
"""The release whose rules hold where none is installed."""


def _why_not(config: TileConfig, problem: Problem, projection: Projection) -> str | None:
    shape, gpu, engine = problem.shape, problem.gpu, problem.adapter.find()
    version = _NEWEST[problem.engine] if engine is None else engine.version
    runs = problem.adapter.effective_config(config, shape.quantization)
    match launch_rules.apply(KernelLaunch(problem.engine, version, runs, shape, projection)):
        case LaunchRule(name, harm):
            return f"breaks the rule that {name}: {harm}"
        case RuledConfig(_, (broken, *_)):
            return f"breaks the rule that {broken.name}: {broken.harm}"
    asked = smem_bytes(runs, shape, gpu.target)
    if asked <= gpu.smem_per_block:
        return None
    fitted = next((it for it in degrade(runs) if smem_bytes(it, shape, gpu.target) <= gpu.smem_per_block), None)
    advice = "no smaller tile fits" if fitted is None else f"the plugin would run {fitted}, the engine alone would end"
    return f"asks for {asked} B of shared memory, and a block has {gpu.smem_per_block} B: {advice}"


def check_by_compiler(
    table: Table, problem: Problem, projection: Projection, progress: Callable[[int, int], None]
) -> list[EntryProblem]:
    """The entries that do not compile, or whose binaries do not fit the GPU.

    Raises:
        EngineError: there is no Triton to compile with.
    """
    source = kernel_source(problem.adapter.find(), problem.adapter)
    jobs = {m: _jobs(config, problem, m, projection) for m, config in table.items()}
    wanted = list(dict.fromkeys(job for of_m in jobs.values() for job in of_m))
    needs = compile_all(source, wanted, cache=CompileCache(default_path()), progress=progress)
    found: list[EntryProblem] = []
    for m, of_m in jobs.items():
        misfits = (candidates.misfit(job, needs[job], problem.gpu) for job in of_m)
        first = next((misfit for misfit in misfits if misfit is not None), None)
        if first is not None:
            found.append(EntryProblem(m, table[m], f"{first.kind}: {' '.join(first.message.split())[:200]}"))
    return found


def _jobs(config: TileConfig, problem: Problem, tokens: int, projection: Projection) -> Sequence[CompileJob]:
    """The binaries of one entry: of both GEMMs where one configuration serves both."""
    runs = problem.adapter.effective_config(config, problem.shape.quantization)
    pair = candidates.pair_jobs({"up": runs, "down": runs}, problem, tokens)
    return pair if not problem.adapter.HAS_DOWN_TABLES else [job for job in pair if job.projection == projection]
