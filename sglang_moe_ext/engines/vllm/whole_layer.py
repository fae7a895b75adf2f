"""Run vLLM's own fused-MoE layer, from the sort of the tokens to the sum, with a configuration that we choose.

For child processes only: it replaces the engine's lookup. A server's layer is a class around the same GEMMs; with
block-wise fp8 it quantises in the kernel of the activation, which this function does in one of its own.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from sglang_moe_ext.core import EngineError, MoEShape, TileConfig
from sglang_moe_ext.engines.tensors import LayerTensors
from sglang_moe_ext.engines.vllm import kernel
from sglang_moe_ext.engines.vllm.entries import entry_of
from sglang_moe_ext.engines.vllm.kernel import Engine

if TYPE_CHECKING:
    import torch


def run(engine: Engine, shape: MoEShape, tensors: LayerTensors, up: TileConfig, down: TileConfig) -> torch.Tensor:
    """[tokens, hidden], by the engine's `fused_experts_impl`.

    Raises:
        EngineError: the GEMMs are to run with different configurations: here one serves both.
    """
    if up != down:
        raise EngineError(f"vLLM runs both GEMMs with one configuration: expected the same twice, got {up} and {down}")
    engine.kernels.try_get_optimal_moe_config = lambda *_, **__: entry_of(up)
    layer = engine.kernels.fused_experts_impl
    out: torch.Tensor = layer(
        tensors.hidden,
        tensors.w1,
        tensors.w2,
        tensors.topk_weights,
        tensors.topk_ids,
        activation="silu" if shape.gated else "relu2_no_mul",
        global_num_experts=kernel.global_experts(shape),
        expert_map=kernel.expert_map(shape, tensors.hidden.device),
        w1_scale=tensors.w1_scale,
        w2_scale=tensors.w2_scale,
        **kernel.flags(shape),
        **({"inplace": False} if "inplace" in inspect.signature(layer).parameters else {}),  # up to 0.20
    )
    return out
