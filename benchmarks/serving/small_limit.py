"""A card with less shared memory than this one has: what its Triton says, and refuses (triton 3.6, compiler.py)."""

from __future__ import annotations

import importlib
from typing import Any

_KERNELS = "fused_moe_kernel"
"""How the names of the engine's MoE kernels begin."""


def simulate(smem_bytes: int) -> None:
    """From now on the device says that a block has so many bytes, and no MoE kernel that needs more is loaded.

    The engine's other kernels keep this card's limit: they chose their tiles for its architecture, and would fail too.
    Comes before the first launch of a MoE kernel, and after that only in a process of its own.
    """
    driver = importlib.import_module("triton.runtime.driver").driver
    compiler: Any = importlib.import_module("triton.compiler.compiler")
    utilities = driver.active.utils
    real_properties, real_init = utilities.get_device_properties, compiler.CompiledKernel._init_handles

    def properties(device: int) -> dict[str, Any]:
        return {**real_properties(device), "max_shared_mem": smem_bytes}

    def init_handles(kernel: Any) -> Any:
        if not kernel.name.startswith(_KERNELS):
            compiler.max_shared_mem = lambda device: real_properties(device)["max_shared_mem"]
        else:
            compiler.max_shared_mem = lambda _: smem_bytes
        return real_init(kernel)

    utilities.get_device_properties = properties
    compiler.CompiledKernel._init_handles = init_handles
