"""Bring vLLM's MoE modules to life in a process of our own, also where there is no GPU.

Only child processes use this: what it changes in the engine must never reach a server.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from sglang_moe_ext.core import EngineError

BATCH_INVARIANT = "VLLM_BATCH_INVARIANT"


def import_engine(module: str) -> Any:
    """The engine's module of that name. It goes on without its compiled operators, and says so in its log.

    Raises:
        EngineError: it cannot be imported.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")  # else 0.33 has no platform, which knows no name of a GPU
    try:
        return importlib.import_module(module)
    except Exception as error:  # an engine can fail to import in any way; the caller needs one line
        raise EngineError(f"cannot import {module}: {type(error).__name__}: {error}") from error


def pretend(device_name: str, *, is_amd: bool) -> None:
    """Let all of the engine believe in the GPU of that name, and in CUDA or ROCm: some defaults depend on that."""
    platform = type(sys.modules["vllm.platforms"].current_platform)
    platform.get_device_name = classmethod(lambda *_, **__: device_name)
    platform.is_cuda = lambda _: not is_amd
    platform.is_rocm = lambda _: is_amd
    names = sys.modules.get("vllm.utils.platform_utils")
    if forget := getattr(getattr(names, "get_device_name_as_file_name", None), "cache_clear", None):  # 0.33
        forget()
