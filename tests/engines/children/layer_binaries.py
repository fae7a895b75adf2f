"""Child: which binaries the whole layer of the SGLang on PYTHONPATH launches, and which the compile farm makes for it.

stdin: {"cases": [{"job": <CompileJob of a GEMM as a dict>, "pair": [up, down], "tokens": M}], "front_end": whether to
stop after Triton's front end}. Last line of stdout: for each case the hashes {"launched": [...], "made": [...]}. No GPU
is here, so tensors have no storage, and nothing is launched.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import triton
from triton.runtime.jit import JITFunction

from sglang_moe_ext.core import TileConfig
from sglang_moe_ext.engines import meta_compile
from sglang_moe_ext.engines.sglang import compile as sglang_compile
from sglang_moe_ext.engines.sglang import runner
from sglang_moe_ext.engines.tensors import LayerTensors
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.kernels.compiled import TargetOnlyDriver
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.search import candidates
from tests.engines.children.compile_jobs import parsed
from tests.engines.children.front_end import stop_after_front_end

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


def launched(job: Any, pair: Any, tokens: int) -> list[str]:
    """Of the engine's own layer at that many tokens."""
    engine, shape = sglang_compile._engine(), job.shape
    sglang_compile._prepare(engine.kernels, job.target)
    triton.runtime.driver.set_active(TargetOnlyDriver(job.target))
    up, down = (
        sglang_compile._tensors(engine, shape, of, tokens, pair[of].compile_key, job.target) for of in ("up", "down")
    )
    # In place of CUDA operators, and of vLLM's that 0.5.8 takes where it sees no GPU.
    engine.layer.moe_sum_reduce = engine.layer.moe_sum_reduce_triton
    engine.layer.vllm_ops = SimpleNamespace(silu_and_mul=lambda *_: None, moe_sum=lambda *_: None)
    engine.layer._down_moe_use_tma = engine.layer._moe_support_tma = lambda: True
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
        runner.run(engine, shape, tensors, pair["up"], pair["down"])
    finally:
        JITFunction.run = run
    return sorted(hashes)


def made(job: Any, pair: Any, tokens: int) -> list[str]:
    """By the jobs that stand for the pair at that many tokens."""
    hashes.clear()
    for each in candidates.pair_jobs(
        pair, Problem(job.shape, replace(find_gpu("H200"), target=job.target), "sglang"), tokens
    ):
        resources_of, meta_compile.resources_of = meta_compile.resources_of, lambda made: hashes.append(made.hash)
        try:
            sglang_compile.compile_job(each)
        finally:
            meta_compile.resources_of = resources_of
    return sorted(hashes)


def answer(document: dict[str, Any]) -> dict[str, list[str]]:
    pair = dict(zip(("up", "down"), (TileConfig(*config) for config in document["pair"]), strict=True))
    given = parsed(document["job"]), pair, document["tokens"]
    return {"launched": launched(*given), "made": made(*given)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        asked = json.load(sys.stdin)
        if asked["front_end"]:
            stop_after_front_end()
        print(json.dumps([answer(document) for document in asked["cases"]]))
