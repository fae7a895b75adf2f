"""Run SGLang's own fused-MoE layer, from the sort of the tokens to the sum, with configurations that we choose.

For child processes only: it replaces the engine's lookup.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sglang_moe_ext.core import MoEShape, TileConfig
from sglang_moe_ext.engines.entries import entry_of
from sglang_moe_ext.engines.sglang.kernel import Engine
from sglang_moe_ext.engines.tensors import LayerTensors

if TYPE_CHECKING:
    import torch


def warm_up(engine: Engine, shape: MoEShape) -> None:
    """Have the activation compiled: the engine calls the CUDA compiler, for seconds, when it is first needed."""
    import torch

    if shape.gated:
        gate_and_up = torch.zeros(1, shape.gemm("up")[0], dtype=getattr(torch, shape.dtype), device="cuda")
        engine.layer.silu_and_mul(gate_and_up, torch.empty_like(gate_and_up[:, : shape.intermediate_size]).contiguous())


def alone(layer: Any) -> None:
    """Put in place what the layer asks of a server: there is none in this process."""
    # At few tokens the engine sums by a function that torch.compile has to make first, seconds for each batch size.
    layer.moe_sum_reduce_torch_compile = layer.moe_sum_reduce
    # Since 0.5.18 the output is allocated for the ranks of the server, of which this process has not even one.
    layer.use_symmetric_memory = lambda *_, **__: nullcontext()
    layer.get_tp_group = lambda: None
    layer.get_parallel = lambda: SimpleNamespace(tp_group=None)


def run(engine: Engine, shape: MoEShape, tensors: LayerTensors, up: TileConfig, down: TileConfig) -> torch.Tensor:
    """[tokens, hidden], by the engine's `fused_experts_impl`."""
    scheme, block = shape.quantisation.scheme, shape.quantisation.block_shape
    engine.layer.try_get_optimal_moe_config = lambda *_, **__: (entry_of(up), (entry_of(down), up.block_m))
    alone(engine.layer)
    out: torch.Tensor = engine.layer.fused_experts_impl(
        tensors.hidden,
        tensors.w1,
        tensors.w2,
        tensors.topk_weights,
        tensors.topk_ids,
        is_gated=shape.gated,
        activation="silu" if shape.gated else "relu2",
        use_fp8_w8a8=scheme == "fp8_w8a8",
        use_int8_w8a8=scheme == "int8_w8a8",
        use_int8_w8a16=scheme == "int8_w8a16",
        use_int4_w4a16=scheme == "int4_w4a16",
        per_channel_quant=shape.quantisation.per_channel,
        w1_scale=tensors.w1_scale,
        w2_scale=tensors.w2_scale,
        block_shape=None if block is None else list(block),
        filter_expert=shape.ep > 1,
    )
    return out
