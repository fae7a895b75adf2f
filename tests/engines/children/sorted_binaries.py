"""Child: which binaries a layer of our own kernels launches, and which the compile pool makes for its plan.

$ENGINE: "vllm", or SGLang's.

stdin: [{"shape": text as --shape takes it, "plan": a kernel plan as JSON has it, "tokens": M}]. Last line of stdout:
for each {"launched": hashes, "made": hashes, "needs": [shared memory, registers, spilled bytes] of each half}. No GPU
is here, so tensors have no storage, and nothing is launched. Most kernels are those
of every release: $TRITON_CACHE_DIR keeps them.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import astuple
from typing import Any

import triton
from triton.runtime.jit import JITFunction

from sglang_moe_ext.core import Failure, Target
from sglang_moe_ext.engines import meta_compile
from sglang_moe_ext.engines.few_tokens_compile import layer_tensors
from sglang_moe_ext.kernel_plans import Plan, SortedKernelJob, list_jobs
from sglang_moe_ext.kernels.compiled import TargetOnlyDriver
from sglang_moe_ext.models import parse_shape
from sglang_moe_ext.tables import plan_table

if os.environ.get("ENGINE") == "vllm":
    from sglang_moe_ext.engines.vllm import adapter
    from sglang_moe_ext.engines.vllm import compile as engine_compile
else:
    from sglang_moe_ext.engines.sglang import adapter
    from sglang_moe_ext.engines.sglang import compile as engine_compile

SM = 90
hashes: list[str] = []
run = JITFunction.run


def note(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
    """Compile where a kernel would be launched, and note which binary that makes."""
    self.device_caches.clear()
    hashes.append(run(self, *arguments, grid=grid, warmup=True, **named).hash)


def launched(job: SortedKernelJob, plan: Plan) -> list[str]:
    """By the whole layer, as the measuring process runs it."""
    engine = engine_compile._engine()
    engine_compile._prepare(engine.kernels, Target(SM))
    triton.runtime.driver.set_active(TargetOnlyDriver(Target(SM)))
    hashes.clear()
    JITFunction.run = note
    try:
        adapter.run_kernel_plan(engine, job.shape, layer_tensors(job), plan)
    finally:
        JITFunction.run = run
    return sorted(hashes)


def made(jobs: tuple[SortedKernelJob, ...]) -> tuple[list[str], list[Any]]:
    """The binaries of the jobs, and what each job says that they need."""
    hashes.clear()
    keep = meta_compile.resources_of

    def keep_hash(kernel: Any) -> Any:
        hashes.append(kernel.hash)
        return keep(kernel)

    meta_compile.resources_of = keep_hash
    try:
        needs = [engine_compile.compile_job(job) for job in jobs]
    finally:
        meta_compile.resources_of = keep
    return sorted(hashes), [repr(need) if isinstance(need, Failure) else astuple(need) for need in needs]


def answer(document: dict[str, Any]) -> dict[str, Any]:
    plan = plan_table.parse_plan(document["plan"])
    jobs = list_jobs(plan, parse_shape(document["shape"]), document["tokens"], SM)
    hashes_made, needs = made(jobs)
    return {"launched": launched(jobs[0], plan), "made": hashes_made, "needs": needs}


def main() -> None:
    print(json.dumps([answer(document) for document in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
