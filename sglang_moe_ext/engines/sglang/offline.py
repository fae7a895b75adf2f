"""Compile SGLang's own kernel for a GPU that need not be here, exactly as a launch on that GPU would specialise it.

The engine's launcher runs on storage-free tensors with a driver that only says which GPU to compile for, so that
signature, divisibility and constants are the engine's own, whatever its version. For child processes only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from sglang_moe_ext.core import CompileJob, CompileKey, Failure, MoEShape, Projection, Resources
from sglang_moe_ext.engines.sglang.any_group import any_group
from sglang_moe_ext.engines.sglang.kernel import Engine, GemmTensors, launch, load, sorted_rows
from sglang_moe_ext.kernels.compiled import TargetOnlyDriver, resources_of
from sglang_moe_ext.kernels.scales import quantise_weights

if TYPE_CHECKING:
    import torch


@functools.cache
def _engine() -> Engine:
    engine = load()
    engine.aligner.sgl_moe_align_block_size = lambda *_: None  # the sizes of its buffers are all that is asked for
    return engine


def warm_up() -> None:
    """Import what a compilation needs; a process that forks calls this once."""
    _engine()


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor without storage: its address is 0, aligned like a fresh CUDA tensor's."""
    import torch

    return torch.empty(shape, dtype=dtype, device="meta")


@functools.lru_cache
def _weights(shape: MoEShape, projection: Projection) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weights as the engine stores them, their scales)."""
    import torch

    columns, reduction = shape.gemm(projection)
    dtype = getattr(torch, shape.dtype)
    if shape.quantisation.scheme is None:
        return _meta((shape.experts, columns, reduction), dtype), None
    stored, scale = quantise_weights(_meta((1, columns, reduction), dtype), shape.quantisation)
    return _meta((shape.experts, *stored.shape[1:]), stored.dtype), _meta(
        (shape.experts, *scale.shape[1:]), scale.dtype
    )


def _tensors(engine: Engine, shape: MoEShape, projection: Projection, tokens: int, key: CompileKey) -> GemmTensors:
    import torch

    columns, reduction = shape.gemm(projection)
    rows_in = tokens * shape.top_k
    if projection == "up":
        rows_in = tokens
    elif key.use_tma:
        rows_in = sorted_rows(shape, tokens, key.block_m)
    activations = getattr(torch, shape.dtype)
    weights, weight_scale = _weights(shape, projection)
    topk_ids = _meta((tokens, shape.top_k), torch.int32)
    sorted_token_ids, expert_ids, num_tokens_post_padded = engine.align(topk_ids, key.block_m, shape.experts)
    return GemmTensors(
        a=_meta((rows_in, reduction), activations),
        weights=weights,
        out=_meta((tokens, shape.top_k, columns), activations),
        weight_scale=weight_scale,
        topk_weights=_meta((tokens, shape.top_k), torch.float32),
        topk_ids=topk_ids,
        sorted_token_ids=sorted_token_ids,
        expert_ids=expert_ids,
        num_tokens_post_padded=num_tokens_post_padded,
    )


def _quantised(dtype_name: str, scale_columns: Callable[[torch.Tensor, int], int]) -> Callable[..., Any]:
    """In place of a quantiser of activations: results of its types and shapes, without storage."""

    def quantise(a: torch.Tensor, group: Any = None, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        columns = scale_columns(a, group if isinstance(group, int) else 0)
        return _meta(tuple(a.shape), getattr(torch, dtype_name)), _meta((a.shape[0], columns), torch.float32)

    return quantise


def _groups(a: torch.Tensor, group: int) -> int:
    return -(-int(a.shape[1]) // group)


def _per_tensor_or_token(a: torch.Tensor, scale: object, use_per_token_if_dynamic: bool = False) -> Any:
    import torch

    rows = int(a.shape[0]) if use_per_token_if_dynamic else 1
    scales = _meta((rows, 1) if use_per_token_if_dynamic else (1,), torch.float32)
    return _meta(tuple(a.shape), torch.float8_e4m3fn), scales


def _prepare(kernels: Any, sm: int) -> None:
    """Set, in the engine's kernel module, what it would find on the GPU, and replace its CUDA-only quantisers."""
    kernels.is_arch_support_pdl = lambda: sm >= 90
    kernels.should_enable_swap_ab = lambda block_m, block_n: sm == 90 and block_m < 64 and block_n >= 64
    kernels.scaled_fp8_quant = _per_tensor_or_token
    kernels.per_token_quant_int8 = _quantised("int8", lambda a, _: 1)
    for prefix in ("", "sglang_"):
        setattr(kernels, f"{prefix}per_token_group_quant_fp8", _quantised("float8_e4m3fn", _groups))
        setattr(kernels, f"{prefix}per_token_group_quant_int8", _quantised("int8", _groups))


def compile_job(job: CompileJob) -> Resources | Failure:
    """What the binary of this job needs, or why the compiler refuses it."""
    import triton
    from triton.runtime.jit import JITFunction

    engine = _engine()
    _prepare(engine.kernels, job.sm)
    triton.runtime.driver.set_active(TargetOnlyDriver(job.sm))
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        self.device_caches.clear()  # Triton keeps the target of the first compilation for each device
        compiled.append(run(self, *arguments, grid=grid, warmup=True, **options))

    config = job.key.with_group(job.group_m or 1)
    tensors = _tensors(engine, job.shape, job.projection, job.tokens, job.key)
    JITFunction.run = compile_only
    try:
        with any_group(engine.kernels) if job.group_m is None else nullcontext():
            launch(engine, job.shape, job.projection, tensors, config, writes_sorted=job.sorted_rows)
    except Exception as error:  # noqa: BLE001 - the compiler fails in many ways; each costs this candidate alone
        return Failure(type(error).__name__, (str(error).strip().splitlines() or ["no message"])[-1][:300])
    finally:
        JITFunction.run = run
    return resources_of(compiled[-1])
