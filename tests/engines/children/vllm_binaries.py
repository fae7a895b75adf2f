"""Child: which binaries the layer of the vLLM on PYTHONPATH launches, which the compile farm makes for it.

stdin: [{"job": <CompileJob of a GEMM as a dict>, "config": [...], "tokens": M}]. Last line of stdout: for each
{"launched": [hash of each GEMM], "made": [hash], "any_group": [[smem, registers, spills] for any group],
"own": [[...] of what was made]}. No GPU is here, so tensors have no storage, and nothing is launched.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import astuple, replace
from typing import Any

import triton
from triton.runtime.jit import JITFunction

from sglang_moe_ext.core import CompileJob, Resources, TileConfig
from sglang_moe_ext.engines import meta_compile
from sglang_moe_ext.engines.tensors import LayerTensors
from sglang_moe_ext.engines.vllm import compile as vllm_compile
from sglang_moe_ext.engines.vllm import runner
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.kernels.compiled import TargetOnlyDriver, resources_of
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.search import candidates
from tests.engines.children.compile_jobs import parsed

KERNELS = ("fused_moe_kernel", "fused_moe_kernel_gptq_awq")
hashes: list[str] = []
run = JITFunction.run


def note(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
    """Compile where a GEMM would be launched, and note which binary that makes; other kernels are left out."""
    if self.fn.__name__ not in KERNELS:
        return None
    self.device_caches.clear()
    compiled = run(self, *arguments, grid=grid, warmup=True, **named)
    hashes.append(compiled.hash)
    return compiled


def launched(job: CompileJob, config: TileConfig, tokens: int) -> list[str]:
    """Of the engine's own layer at that many tokens."""
    engine, shape = vllm_compile._engine(), job.shape
    vllm_compile._prepare(engine.kernels, job.target)
    triton.runtime.driver.set_active(TargetOnlyDriver(job.target))
    # In place of CUDA operators.
    engine.kernels.apply_moe_activation = lambda *_, **__: None
    engine.kernels.ops.moe_sum = lambda *_: None
    up, down = (
        vllm_compile._tensors(engine, shape, of, tokens, config.compile_key, job.target) for of in ("up", "down")
    )
    tensors = LayerTensors(
        hidden=up.a,
        w1=up.weights,
        w2=down.weights,
        w1_scale=up.weight_scale,
        w2_scale=down.weight_scale,
        topk_weights=up.topk_weights,
        topk_ids=up.topk_ids,
    )
    hashes.clear()
    JITFunction.run = note
    try:
        runner.run(engine, shape, tensors, config, config)
    finally:
        JITFunction.run = run
    return sorted(hashes)


def compiled(job: CompileJob) -> Any:
    """The compiled kernel of a job."""
    found: list[Any] = []

    def keep(kernel: Any) -> Resources:
        found.append(kernel)
        return resources_of(kernel)

    meta_compile.resources_of, before = keep, meta_compile.resources_of
    try:
        vllm_compile.compile_job(job)
    finally:
        meta_compile.resources_of = before
    return found[-1]


def answer(document: dict[str, Any]) -> dict[str, Any]:
    job, config, tokens = parsed(document["job"]), TileConfig(*document["config"]), document["tokens"]
    pair = {"up": config, "down": config}
    problem = Problem(job.shape, replace(find_gpu("H200"), target=job.target), "vllm")
    jobs = candidates.pair_jobs(pair, problem, tokens)  # type: ignore[arg-type]
    own = [compiled(each) for each in jobs]
    screened = [
        candidates.screening_job(problem, tokens, projection, config.compile_key) for projection in ("up", "down")
    ]
    return {
        "launched": launched(job, config, tokens),
        "made": sorted(kernel.hash for kernel in own),
        "own": [astuple(resources_of(kernel)) for kernel in own],
        "any_group": [astuple(resources_of(compiled(each))) for each in screened],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        print(json.dumps([answer(document) for document in json.load(sys.stdin)]))
