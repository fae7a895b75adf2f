"""What our hooks do in a running engine, whichever it is: put a function in, know the GPU and Triton's refusals."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from sglang_moe_ext.core import Gpu, GpuError
from sglang_moe_ext.gpu import specs

AnyFunction = Callable[..., Any]


def replace(package: str, original: AnyFunction, ours: AnyFunction) -> None:
    """Put ours wherever a module of the package has bound the original; modules to come find ours."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != package or module is None:
            continue
        for bound, value in list(vars(module).items()):
            if value is original:
                setattr(module, bound, ours)


def running_gpu(device_name: str) -> Gpu | None:
    """The GPU that kernels are launched on, with the shared memory that Triton will hold them against.

    None where nothing is known of it. Where torch sees no GPU, what is known of one of that name.
    """
    import torch

    if not torch.cuda.is_available():
        return specs.known_gpus().get(device_name)
    from triton.runtime import driver

    device = torch.cuda.current_device()
    try:
        here = specs.describe(torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device))
    except GpuError:
        return None
    limit = driver.active.utils.get_device_properties(device)["max_shared_mem"]
    return dataclasses.replace(here, smem_per_block=int(limit))


def is_traced() -> Callable[[], bool]:
    """Torch's own answer, which torch.compile knows without asking: whether it traces what calls this."""
    from torch.compiler import is_compiling

    return is_compiling


def is_capturing() -> Callable[[], bool]:
    """Torch's own answer: whether the current stream is captured into a CUDA graph. Never so without a GPU."""
    import torch

    return torch.cuda.is_current_stream_capturing if torch.cuda.is_available() else lambda: False


def is_out_of_resources(error: BaseException) -> bool:
    """Whether Triton refused to load a kernel that asks for more than the GPU has."""
    from triton.runtime.errors import OutOfResources

    return isinstance(error, OutOfResources)


_COMPILERS = ("triton.compiler.", "triton.backends.nvidia.compiler", "triton.backends.amd.compiler")
_BINDS_ARGUMENTS = "triton.runtime.jit"
_OF_THE_DRIVER = "[CUDA]"


def is_compile_failure(error: BaseException) -> bool:
    """Whether it was raised while Triton compiled a kernel or bound its launch options, so that nothing has run.

    The compiler raises its own errors, and those of MLIR, LLVM and ptxas as RuntimeError; so its frames tell, and not
    the class. An error of the driver may be the late echo of another kernel's, and is not one.
    """
    if not isinstance(error, Exception) or _OF_THE_DRIVER in str(error):
        return False
    names: list[str] = []
    trace = error.__traceback__
    while trace is not None:
        names.append(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    return any(name.startswith(_COMPILERS) for name in names) or names[-1:] == [_BINDS_ARGUMENTS]
