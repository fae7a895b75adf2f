"""Which binary a launch of our fused-MoE GEMM asks for, as triton.compile wants it: no GPU, no tensor allocated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sglang_moe_ext.core import CompileJob, CompileKey, Failure, MoEExtError, MoEShape, Projection, Resources, Target
from sglang_moe_ext.kernels.compiled import TargetOnlyDriver, resources_of, triton_target
from sglang_moe_ext.kernels.fused_moe import UNSPECIALIZED, fused_moe_kernel, kernel_arguments
from sglang_moe_ext.kernels.quantize import STORED_DTYPE, Scales
from sglang_moe_ext.kernels.reference import Alignment

TRITON_TYPE = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.int32: "*i32",
}


@dataclass(frozen=True, slots=True)
class CompileSignature:
    """What triton.compile asks for: ASTSource(fn, signature, constexprs, attrs) and options."""

    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]


def compile_signature(shape: MoEShape, projection: Projection, key: CompileKey, target: Target) -> CompileSignature:
    """The binary that a launch of `shape` asks for, with or without a GPU; down multiplies by the routed weights.

    Built from meta tensors by the launch's own `kernel_arguments`, so that the two cannot drift apart.
    """
    columns, k = shape.gemm(projection)
    slots = 1 if projection == "down" else shape.top_k
    quantization = shape.quantization
    scales = meta_scales(shape, columns, k)
    dtype = getattr(torch, shape.dtype)
    stored = dtype if scales is None else STORED_DTYPE[str(quantization.scheme)]
    with torch.device("meta"):
        alignment = Alignment(*(torch.empty(size, dtype=torch.int32) for size in (key.block_m, 1, 1)))
        arguments = kernel_arguments(
            torch.empty(1, k, dtype=stored),
            torch.empty(shape.experts, columns, k, dtype=stored),
            torch.empty(1, slots, columns, dtype=dtype),
            alignment,
            key,
            target.sm,
            top_k=slots,
            scales=scales,
            routed_weights=torch.empty(1, slots) if projection == "down" else None,
        )
    return specialize(fused_moe_kernel, UNSPECIALIZED, arguments | {"group_m": 1}, key)


def meta_scales(shape: MoEShape, columns: int, k: int) -> Scales | None:
    """Scales of one row of activations, by shape alone."""
    quantization = shape.quantization
    if quantization.scheme is None:
        return None
    if quantization.scheme not in STORED_DTYPE:
        raise MoEExtError(f"fused_moe_kernel cannot do {quantization}; it does {', '.join(STORED_DTYPE)} and 16 bits")
    with torch.device("meta"):
        if quantization.block_shape is not None:
            n, d = quantization.block_shape
            return Scales(
                quantization, torch.empty(1, -(-k // d)), torch.empty(shape.experts, -(-columns // n), -(-k // d))
            )
        if quantization.per_channel:
            return Scales(quantization, torch.empty(1, 1), torch.empty(shape.experts, columns, 1))
        return Scales(quantization, torch.empty(1), torch.empty(shape.experts))


def specialize(
    kernel: Any, unspecialized: Collection[str], arguments: Mapping[str, Any], key: CompileKey
) -> CompileSignature:
    """As Triton's launcher does it: None and 1 are constants, what 16 divides is marked so, pointers are aligned."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        special = parameter.name not in unspecialized
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constexprs[parameter.name] = value
            continue
        pointer = isinstance(value, Tensor)
        signature[parameter.name] = TRITON_TYPE[value.dtype] if pointer else "i32" if value < 2**31 else "i64"
        if pointer or (special and value % 16 == 0):
            attrs[(index,)] = [["tt.divisibility", 16]]
    options = {"num_warps": key.num_warps, "num_stages": key.num_stages}
    return CompileSignature(kernel, signature, constexprs, attrs, options)


def compile_offline(sign: Callable[[], CompileSignature], target: Target) -> Resources | Failure:
    """What that binary needs, or why the compiler refuses it. One binary serves every batch size and group."""
    import triton
    from triton.compiler import ASTSource

    triton.runtime.driver.set_active(TargetOnlyDriver(target))
    try:
        asked = sign()
        source = ASTSource(asked.fn, asked.signature, asked.constexprs, asked.attrs)
        return resources_of(triton.compile(source, target=triton_target(target), options=asked.options))
    except Exception as error:  # noqa: BLE001 - the compiler fails in many ways; each costs this candidate alone
        return Failure(type(error).__name__, (str(error).strip().splitlines() or ["no message"])[-1][:300])


def warm_up() -> None:
    """Import what a compilation needs; a process that forks calls this once."""
    import sglang_moe_ext.kernels.fused_moe  # noqa: F401


def compile_job(job: CompileJob) -> Resources | Failure:
    """What the job's binary needs, or why the compiler refuses it."""
    return compile_offline(lambda: compile_signature(job.shape, job.projection, job.key, job.target), job.target)
