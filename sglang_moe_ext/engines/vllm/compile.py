"""Compile vLLM's own kernel for a GPU that need not be here, exactly as a launch on that GPU would specialize it.

The engine's launcher runs on storage-free tensors, as SGLang's does in engines/sglang/compile.py.
For child processes only.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from sglang_moe_ext.core import CompileJob, CompileKey, Failure, MoEShape, Projection, Resources, Target, TileConfig
from sglang_moe_ext.engines import few_tokens_compile, meta_compile, sorted_compile
from sglang_moe_ext.engines.meta_compile import meta
from sglang_moe_ext.engines.tensors import GemmTensors
from sglang_moe_ext.engines.vllm import runner
from sglang_moe_ext.engines.vllm.experts import NoHost
from sglang_moe_ext.engines.vllm.runner import LoadedVllm
from sglang_moe_ext.few_tokens_config import FewTokensConfig
from sglang_moe_ext.kernel_plans import SortedKernelJob

if TYPE_CHECKING:
    import torch


@functools.cache
def _engine() -> LoadedVllm:
    engine = runner.load()
    # The sizes of its buffers are all that is asked for.
    engine.kernels.ops.moe_align_block_size = lambda *_, **__: None
    return engine


def warm_up() -> None:
    """Import what a compilation needs; a process that forks calls this once."""
    _engine()


def _quantized(
    target: Target,
    A: torch.Tensor,  # noqa: N803 - the engine's names
    A_scale: None,  # noqa: N803
    quant_dtype: torch.dtype | None,
    per_act_token_quant: bool,
    block_shape: list[int] | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """In place of the engine's quantizer of activations, which needs the GPU: its types and shapes."""
    import torch

    if quant_dtype is None:
        return A, None
    rows, k = A.shape
    if block_shape is not None:
        scales: tuple[int, ...] = (rows, -(-k // block_shape[1]))
    else:
        scales = (rows, 1) if per_act_token_quant else (1,)
    stored = getattr(torch, target.fp8_dtype) if quant_dtype == torch.float8_e4m3fn else quant_dtype
    return meta((rows, k), stored), meta(scales, torch.float32)


def _tensors(
    engine: LoadedVllm, shape: MoEShape, projection: Projection, tokens: int, key: CompileKey, target: Target
) -> GemmTensors:
    import torch

    columns, reduction = shape.gemm(projection)
    activations = getattr(torch, shape.dtype)
    weights, weight_scale = meta_compile.weights(shape, projection, target)
    topk_ids = meta((tokens, shape.top_k), torch.int32)
    sorted_token_ids, expert_ids, num_tokens_post_padded = runner.sort(engine, shape, topk_ids, key.block_m)
    return GemmTensors(
        a=meta((tokens if projection == "up" else tokens * shape.top_k, reduction), activations),
        weights=weights,
        out=meta((tokens, shape.top_k, columns), activations),
        weight_scale=weight_scale,
        topk_weights=meta((tokens, shape.top_k), torch.float32),
        topk_ids=topk_ids,
        sorted_token_ids=sorted_token_ids,
        expert_ids=expert_ids,
        num_tokens_post_padded=num_tokens_post_padded,
    )


def _prepare(kernels: Any, target: Target) -> None:
    """Set, in the engine's kernel module, what it would find on the GPU, and replace its quantizer of activations."""
    sm = target.sm
    kernels.moe_kernel_quantize_input = functools.partial(_quantized, target)
    # Since 0.25 at the latest; before, the operands are never swapped.
    kernels.enable_swap_ab = lambda block_m, block_n: sm == 90 and block_m < 64 and block_n >= 64


def compile_job(job: CompileJob | SortedKernelJob) -> Resources | Failure:
    """What the binary of this job needs, or why the compiler refuses it."""
    engine = _engine()
    if isinstance(job, SortedKernelJob):
        if isinstance(job.config, FewTokensConfig):
            return few_tokens_compile.compile_launch(job, job.config)
        return sorted_compile.compile_sorted(NoHost(), job)
    _prepare(engine.kernels, job.target)
    tensors = _tensors(engine, job.shape, job.projection, job.tokens, job.key, job.target)

    def launch_with(config: TileConfig) -> None:
        runner.launch(engine, job.shape, job.projection, tensors, config)

    return meta_compile.compile_gemm(job, engine.kernels, launch_with)
