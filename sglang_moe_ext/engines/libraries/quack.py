"""A layer by quack (CuTe DSL): a gated grouped GEMM that gathers the tokens, and a second one. Hopper and newer.

The weights stay as the engine has them: `concat_layout` says that gate and up lie one after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_moe_ext.core import MoEShape
from sglang_moe_ext.engines.libraries.layer_library import RunLayer, why_quantized
from sglang_moe_ext.engines.libraries.pairs_by_expert import sort_pairs
from sglang_moe_ext.engines.tensors import LayerTensors

if TYPE_CHECKING:
    import torch


class Quack:
    TITLE = "quack"
    PACKAGE = "quack-kernels"
    MODULE = "quack.gemm_interface"

    def why_unsupported(self, shape: MoEShape) -> str | None:
        return why_quantized(shape)

    def prepare(self, shape: MoEShape, tensors: LayerTensors) -> RunLayer:
        from quack.gemm_interface import gemm, gemm_gated

        up, down = tensors.w1.transpose(1, 2), tensors.w2.transpose(1, 2)

        def run(batch: LayerTensors) -> torch.Tensor:
            pairs = sort_pairs(batch.topk_ids, shape.experts)
            bounds = pairs.bounds
            _, inner = gemm_gated(
                batch.hidden, up, activation="swiglu", store_preact=False,
                cu_seqlens_m=bounds, A_idx=pairs.tokens.int(), concat_layout=("B",),
            )  # fmt: skip
            return pairs.add_up(gemm(inner, down, cu_seqlens_m=bounds), batch.topk_weights)

        return run
