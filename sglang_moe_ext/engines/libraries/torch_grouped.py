"""A layer by `torch._grouped_mm`: two grouped products of 16 bits, and torch's operators between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_moe_ext.core import MoEShape
from sglang_moe_ext.engines.libraries.layer_library import RunLayer, why_quantized
from sglang_moe_ext.engines.libraries.pairs_by_expert import sort_pairs
from sglang_moe_ext.engines.tensors import LayerTensors

if TYPE_CHECKING:
    import torch


class TorchGrouped:
    TITLE = "torch._grouped_mm"
    PACKAGE = "torch"
    MODULE = "torch"

    def why_unsupported(self, shape: MoEShape) -> str | None:
        return "it multiplies bfloat16 alone" if shape.dtype != "bfloat16" else why_quantized(shape)

    def prepare(self, shape: MoEShape, tensors: LayerTensors) -> RunLayer:
        import torch

        up, down = tensors.w1.transpose(1, 2), tensors.w2.transpose(1, 2)

        def run(batch: LayerTensors) -> torch.Tensor:
            pairs = sort_pairs(batch.topk_ids, shape.experts)
            gate, linear = torch._grouped_mm(batch.hidden[pairs.tokens], up, offs=pairs.ends).chunk(2, dim=-1)
            inner = torch.nn.functional.silu(gate) * linear
            return pairs.add_up(torch._grouped_mm(inner, down, offs=pairs.ends), batch.topk_weights)

        return run
