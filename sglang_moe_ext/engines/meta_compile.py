"""Compile what an engine's launcher launches, for a GPU that need not be here: tensors have no storage, nothing runs.

For child processes only: it takes the place of Triton's driver and of its launches.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from sglang_moe_ext.core import CompileJob, Failure, MoEShape, Projection, Resources, Target, TileConfig
from sglang_moe_ext.kernels.compiled import TargetOnlyDriver, resources_of
from sglang_moe_ext.kernels.quantize import quantize_weights

if TYPE_CHECKING:
    import torch


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor without storage: its address is 0, aligned like a fresh CUDA tensor's."""
    import torch

    return torch.empty(shape, dtype=dtype, device="meta")


@functools.lru_cache
def weights(shape: MoEShape, projection: Projection, target: Target) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weights as the engines store them for that architecture, their scales)."""
    import torch

    columns, reduction = shape.gemm(projection)
    dtype = getattr(torch, shape.dtype)
    if shape.quantization.scheme is None:
        return meta((shape.experts, columns, reduction), dtype), None
    stored, scale = quantize_weights(meta((1, columns, reduction), dtype), shape.quantization)
    kept = getattr(torch, target.fp8_dtype) if stored.dtype == torch.float8_e4m3fn else stored.dtype
    return meta((shape.experts, *stored.shape[1:]), kept), meta((shape.experts, *scale.shape[1:]), scale.dtype)


def compile_last_launch(target: Target, launch: Callable[[], object]) -> Resources | Failure:
    """What the last binary that `launch` launches needs on that architecture, or why the compiler refuses it."""
    compiled = _compile_launches(target, launch)
    return compiled if isinstance(compiled, Failure) else resources_of(compiled[-1])


def compile_every_launch(target: Target, launch: Callable[[], object]) -> Resources | Failure:
    """The most that any binary needs which `launch` launches on that architecture, or why the compiler refuses one."""
    compiled = _compile_launches(target, launch)
    if isinstance(compiled, Failure):
        return compiled
    needs = [resources_of(kernel) for kernel in compiled]
    return Resources(
        smem_bytes=max(need.smem_bytes for need in needs),
        registers=max(need.registers for need in needs),
        spill_bytes=max(need.spill_bytes for need in needs),
    )


def _compile_launches(target: Target, launch: Callable[[], object]) -> list[Any] | Failure:
    import triton
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(TargetOnlyDriver(target))
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        self.device_caches.clear()  # Triton keeps the target of the first compilation for each device
        compiled.append(run(self, *arguments, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only
    try:
        launch()
    except Exception as error:  # noqa: BLE001 - the compiler fails in many ways; each costs this candidate alone
        return Failure(type(error).__name__, (str(error).strip().splitlines() or ["no message"])[-1][:300])
    finally:
        JITFunction.run = run
    return compiled


GROUP = "GROUP_SIZE_M"
_KERNELS = ("fused_moe_kernel", "fused_moe_kernel_gptq_awq")
"""Of SGLang and of vLLM, which share their origin."""


@functools.cache
def _taking_group(kernel: Any) -> Any:
    """The same Triton function, with the same source, for which the group is not a constant."""
    import triton

    fn = kernel.fn
    copy = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    copy.__kwdefaults__, copy.__qualname__, copy.__module__ = fn.__kwdefaults__, fn.__qualname__, fn.__module__
    copy.__annotations__ = {name: kind for name, kind in fn.__annotations__.items() if name != GROUP}
    return triton.jit(copy, do_not_specialize=[*(kernel.do_not_specialize or ()), GROUP])


@contextmanager
def any_group(kernels: Any) -> Iterator[None]:
    """Within, the engine's launcher runs the kernels of that module with the group as an argument."""
    own = {name: getattr(kernels, name) for name in _KERNELS}
    for name, kernel in own.items():
        setattr(kernels, name, _taking_group(kernel))
    try:
        yield
    finally:
        for name, kernel in own.items():
            setattr(kernels, name, kernel)


def forget_binaries(kernels: Any) -> None:
    """Drop what Triton keeps in memory of each binary: thousands of them would take gigabytes."""
    for name in _KERNELS:
        kernel = getattr(kernels, name)
        for each in (kernel, _taking_group(kernel)):
            each.device_caches.clear()


def compile_gemm(job: CompileJob, kernels: Any, launch: Callable[[TileConfig], None]) -> Resources | Failure:
    """What the binary of this job needs, or why the compiler refuses it; `launch` runs the engine's own launcher."""
    config = job.key.with_group(job.group_m or 1)

    def launch_it() -> None:
        with any_group(kernels) if job.group_m is None else nullcontext():
            launch(config)

    return compile_last_launch(job.target, launch_it)
