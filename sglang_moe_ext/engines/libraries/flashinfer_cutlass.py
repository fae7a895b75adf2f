"""A layer by FlashInfer's CUTLASS fused MoE, which it compiles at its first call. Hopper and newer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_moe_ext.core import MoEShape
from sglang_moe_ext.engines.libraries.layer_library import RunLayer, why_quantized
from sglang_moe_ext.engines.tensors import LayerTensors

if TYPE_CHECKING:
    import torch


class FlashinferCutlass:
    TITLE = "FlashInfer CUTLASS"
    PACKAGE = "flashinfer-python"
    MODULE = "flashinfer.fused_moe"

    def why_unsupported(self, shape: MoEShape) -> str | None:
        return why_quantized(shape)

    def prepare(self, shape: MoEShape, tensors: LayerTensors) -> RunLayer:
        import torch
        from flashinfer.fused_moe import cutlass_fused_moe

        gate, linear = tensors.w1.chunk(2, dim=1)
        up = torch.cat([linear, gate], dim=1)  # it has the linear half first

        def run(batch: LayerTensors) -> torch.Tensor:
            [out] = cutlass_fused_moe(
                batch.hidden, batch.topk_ids.int(), batch.topk_weights.float(), up, tensors.w2, batch.hidden.dtype,
                quant_scales=[],
            )  # fmt: skip
            result: torch.Tensor = out
            return result

        return run
