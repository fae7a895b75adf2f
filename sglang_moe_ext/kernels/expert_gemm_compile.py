"""Which binary a launch of `grouped_gemm` asks for, and what it needs: no GPU, no tensor allocated."""

from __future__ import annotations

import torch

from sglang_moe_ext.core import CompileJob, CompileKey, Failure, MoEShape, Resources
from sglang_moe_ext.kernels.expert_gemm import UNSPECIALIZED, expert_gemm_kernel, kernel_arguments
from sglang_moe_ext.kernels.fused_moe_compile import CompileSignature, compile_offline, meta_scales, specialize
from sglang_moe_ext.kernels.quantize import STORED_DTYPE, Scales


def compile_signature(shape: MoEShape, key: CompileKey) -> CompileSignature:
    """The binary for the up GEMM of `shape`, with or without a GPU, by the launch's own `kernel_arguments`."""
    columns, k = shape.gemm("up")
    dtype, scheme = getattr(torch, shape.dtype), shape.quantization.scheme
    with torch.device("meta"):
        if scheme is None:
            stored, weights, scales = dtype, dtype, None
        elif scheme in STORED_DTYPE:
            stored = weights = STORED_DTYPE[scheme]
            scales = meta_scales(shape, columns, k)
        else:
            stored, weights = dtype, torch.int8
            scales = Scales(shape.quantization, None, torch.empty(shape.experts, columns, 1))
        arguments = kernel_arguments(
            torch.empty(1, k, dtype=stored),
            torch.empty(shape.experts, columns, k, dtype=weights),
            torch.empty(1, columns, dtype=dtype),
            torch.empty(shape.experts + 1, dtype=torch.int32),
            key,
            scales,
        )
    return specialize(expert_gemm_kernel, UNSPECIALIZED, arguments | {"group_m": 1}, key)


def warm_up() -> None:
    """Nothing: importing this module imports what a compilation needs."""


def compile_job(job: CompileJob) -> Resources | Failure:
    """What the job's binary needs, or why the compiler refuses it."""
    return compile_offline(lambda: compile_signature(job.shape, job.key), job.target)
