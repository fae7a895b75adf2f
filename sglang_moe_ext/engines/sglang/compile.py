"""Compile SGLang's own kernel for a GPU that need not be here, exactly as a launch on that GPU would specialize it.

The engine's launcher runs on storage-free tensors with a driver that only says which GPU to compile for, so that
signature, divisibility and constants are the engine's own, whatever its version. For child processes only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_moe_ext.core import (
    CompileJob,
    CompileKey,
    Failure,
    MoEShape,
    Projection,
    Resources,
    Target,
    TileConfig,
)
from sglang_moe_ext.engines import few_tokens_compile, meta_compile, sorted_compile
from sglang_moe_ext.engines.meta_compile import meta
from sglang_moe_ext.engines.sglang.runner import LoadedSglang, launch, load
from sglang_moe_ext.engines.tensors import GemmTensors
from sglang_moe_ext.few_tokens_config import FewTokensConfig
from sglang_moe_ext.kernel_plans import (
    SortedKernelJob,
    padded_rows,
)

if TYPE_CHECKING:
    import torch


@functools.cache
def _engine() -> LoadedSglang:
    engine = load()
    engine.aligner.sgl_moe_align_block_size = lambda *_: None  # the sizes of its buffers are all that is asked for
    return engine


def warm_up() -> None:
    """Import what a compilation needs; a process that forks calls this once."""
    _engine()


def _tensors(
    engine: LoadedSglang, shape: MoEShape, projection: Projection, tokens: int, key: CompileKey, target: Target
) -> GemmTensors:
    import torch

    columns, reduction = shape.gemm(projection)
    rows_in = tokens * shape.top_k
    if projection == "up":
        rows_in = tokens
    elif key.use_tma:
        rows_in = padded_rows(tokens * shape.top_k, shape.experts, key.block_m)
    activations = getattr(torch, shape.dtype)
    weights, weight_scale = meta_compile.weights(shape, projection, target)
    topk_ids = meta((tokens, shape.top_k), torch.int32)
    sorted_token_ids, expert_ids, num_tokens_post_padded = engine.align(topk_ids, key.block_m, shape.experts)
    return GemmTensors(
        a=meta((rows_in, reduction), activations),
        weights=weights,
        out=meta((tokens, shape.top_k, columns), activations),
        weight_scale=weight_scale,
        topk_weights=meta((tokens, shape.top_k), torch.float32),
        topk_ids=topk_ids,
        sorted_token_ids=sorted_token_ids,
        expert_ids=expert_ids,
        num_tokens_post_padded=num_tokens_post_padded,
    )


def _quantized(dtype_name: str, scale_columns: Callable[[torch.Tensor, int], int]) -> Callable[..., Any]:
    """In place of a quantizer of activations: results of its types and shapes, without storage."""

    def quantize(a: torch.Tensor, group: Any = None, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        columns = scale_columns(a, group if isinstance(group, int) else 0)
        return meta(tuple(a.shape), getattr(torch, dtype_name)), meta((a.shape[0], columns), torch.float32)

    return quantize


def _groups(a: torch.Tensor, group: int) -> int:
    return -(-int(a.shape[1]) // group)


def _per_tensor_or_token(dtype_name: str) -> Callable[..., Any]:
    """The same, in place of the quantizer that knows no groups."""

    def quantize(a: torch.Tensor, scale: object, use_per_token_if_dynamic: bool = False) -> Any:
        import torch

        rows = int(a.shape[0]) if use_per_token_if_dynamic else 1
        scales = meta((rows, 1) if use_per_token_if_dynamic else (1,), torch.float32)
        return meta(tuple(a.shape), getattr(torch, dtype_name)), scales

    return quantize


def _prepare(kernels: Any, target: Target) -> None:
    """Set, in the engine's kernel module, what it would find on the GPU, and replace its CUDA-only quantizers."""
    sm, float8 = target.sm, target.fp8_dtype
    kernels._is_hip, kernels._is_cuda = target.is_amd, not target.is_amd
    kernels.is_arch_support_pdl = lambda: sm >= 90
    kernels.should_enable_swap_ab = lambda block_m, block_n: sm == 90 and block_m < 64 and block_n >= 64
    kernels.scaled_fp8_quant = _per_tensor_or_token(float8)
    kernels.per_token_quant_int8 = _quantized("int8", lambda a, _: 1)
    for prefix in ("", "sglang_"):
        setattr(kernels, f"{prefix}per_token_group_quant_fp8", _quantized(float8, _groups))
        setattr(kernels, f"{prefix}per_token_group_quant_int8", _quantized("int8", _groups))


def compile_job(job: CompileJob | SortedKernelJob) -> Resources | Failure:
    """What the binary of this job needs, or why the compiler refuses it."""
    engine = _engine()
    _prepare(engine.kernels, job.target)
    match job:
        case CompileJob():
            return _compile_gemm(engine, job)
        case SortedKernelJob(config=FewTokensConfig() as plan):
            return few_tokens_compile.compile_launch(job, plan)
        case SortedKernelJob():
            return sorted_compile.compile_sorted(engine, job)


def _compile_gemm(engine: LoadedSglang, job: CompileJob) -> Resources | Failure:
    tensors = _tensors(engine, job.shape, job.projection, job.tokens, job.key, job.target)

    def launch_with(config: TileConfig) -> None:
        launch(engine, job.shape, job.projection, tensors, config, writes_sorted=job.sorted_rows)

    return meta_compile.compile_gemm(job, engine.kernels, launch_with)
