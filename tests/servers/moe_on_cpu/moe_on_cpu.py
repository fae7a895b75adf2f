"""A plugin for tests: SGLang's MoE layers run their real Triton kernel, interpreted, and tell what they launched.

It is needed because there is no GPU. On a CPU the engine computes its MoE layers in plain torch, asks for no
configuration, and launches no Triton kernel: nothing that this project hooks is ever reached. So the layers are sent
to the engine's own Triton runner, with the parts that exist for CUDA alone replaced: the sort of the tokens, the
dispatch of two operators, and the GPU's name. What is tested (lookup, launcher, kernel) stays the engine's.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

LAUNCHES = "MOE_ON_CPU_LAUNCHES"
"""The file that gets one JSON object for each launch of the kernel, in every process."""
TUNER = "MOE_ON_CPU_TUNER"
"""A script that runs in the place of `sglang-moe-ext tune`, which cannot measure without a GPU."""
DEVICE_NAME = "NVIDIA H200"
OF_A_CONFIG = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
_PACKAGE = "sglang.srt.layers.moe.moe_runner.triton_utils"
_OPERATORS = {"inplace_fused_experts": True, "outplace_fused_experts": False}


class Recorded:
    """The Triton kernel, which notes what it is launched with: below the launcher, and below whatever wraps that."""

    def __init__(self, kernel: Any, file: str) -> None:
        self._kernel, self._file = kernel, file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        run = self._kernel[grid]

        def launch(*tensors: Any, **options: Any) -> Any:
            config = {name: options[name] for name in OF_A_CONFIG if name in options}
            gemm = "down" if options["MUL_ROUTED_WEIGHT"] else "up"
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(json.dumps({"pid": os.getpid(), "gemm": gemm, "config": config}) + "\n")
            return run(*tensors, **options)

        return launch


def sorted_by_expert(
    topk_ids: torch.Tensor,
    experts_and_one: int,
    block_m: int,
    sorted_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    padded_tokens: torch.Tensor,
    *_: Any,
) -> None:
    """The engine's CUDA operator of the same signature: fills the buffers, each expert's part up to a whole block.

    Pairs of experts of other ranks, which have -1 for one, lie first: the kernel writes zeros for them.
    """
    flat = topk_ids.flatten()
    sorted_ids.fill_(flat.numel())
    expert_ids.fill_(-1)
    row = 0
    for expert in range(-1, experts_and_one - 1):
        (mine,) = (flat == expert).nonzero(as_tuple=True)
        blocks = -(-mine.numel() // block_m)
        sorted_ids[row : row + mine.numel()] = mine.to(sorted_ids.dtype)
        expert_ids[row // block_m : row // block_m + blocks] = expert
        row += blocks * block_m
    padded_tokens[0] = row


def _run_triton(method: Any, layer: Any, dispatch_output: Any) -> Any:
    return method.runner.run(dispatch_output, method.get_triton_quant_info(layer))


def _on_cpu(layer: Any, name: str, inplace: bool) -> Callable[..., Any]:
    """The operator of that name, as the engine defines it for CUDA."""
    names = [argument.name for argument in getattr(torch.ops.sglang, name).default._schema.arguments]

    def run(*arguments: Any, **options: Any) -> Any:
        stated = {**dict(zip(names, arguments, strict=False)), **options}
        return layer.fused_experts_impl(**stated, inplace=inplace)

    return run


def register() -> None:
    """Entry point of the group `sglang.srt.plugins`."""
    import moe_on_cpu_interpreter
    import moe_on_cpu_quick_interpreter
    from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

    moe_on_cpu_interpreter.repair()
    moe_on_cpu_quick_interpreter.quicken()
    UnquantizedFusedMoEMethod.forward_cpu = UnquantizedFusedMoEMethod.forward_native = _run_triton
    layer = importlib.import_module(f"{_PACKAGE}.fused_moe")
    for name, inplace in _OPERATORS.items():
        setattr(layer, name, _on_cpu(layer, name, inplace))
    importlib.import_module(f"{_PACKAGE}.moe_align_block_size").sgl_moe_align_block_size = sorted_by_expert
    importlib.import_module(f"{_PACKAGE}.fused_moe_triton_config").get_device_name = lambda *_: DEVICE_NAME
    kernels = importlib.import_module(layer.moe_sum_reduce_triton.__module__)
    kernels.fused_moe_kernel = Recorded(kernels.fused_moe_kernel, os.environ[LAUNCHES])
    if TUNER in os.environ:
        _stand_for_the_tuner(os.environ[TUNER])


def _stand_for_the_tuner(script: str) -> None:
    """What a start tunes is worked out from the real settings; the GPU and what measures on it are stood for."""
    from sglang_moe_ext.engines.sglang import model_loading
    from sglang_moe_ext.serving import tuner_process

    model_loading.DEVICE = "cpu"
    model_loading._gpus = lambda *_: ((0,), DEVICE_NAME)
    tuner_process.COMMAND = (sys.executable, "-W", "ignore", script)
