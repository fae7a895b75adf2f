"""A layer of any engine run by the two launches for few tokens, straight from topk_ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_moe_ext.core import Quantization
from sglang_moe_ext.engines.tensors import LayerTensors
from sglang_moe_ext.few_tokens_config import FewTokensConfig

if TYPE_CHECKING:
    import torch


def run(
    tensors: LayerTensors,
    quantization: Quantization,
    plan: FewTokensConfig,
    out: torch.Tensor,
    routed_scaling_factor: float = 1.0,
) -> None:
    """Write [tokens, hidden] to `out`, which may be the hidden states themselves.

    What lies between the launches comes from torch's allocator at each call, which keeps streams and CUDA graphs apart:
    [rows, I] of 16 bits; where the plan splits the down GEMM, float32 [split, tokens, hidden] besides. Up to 4 MB.
    """
    from sglang_moe_ext.kernels.few_tokens import ExpertWeights, Routed, few_tokens_layer

    few_tokens_layer(
        tensors.hidden,
        ExpertWeights(tensors.w1, tensors.w1_scale, quantization),
        ExpertWeights(tensors.w2, tensors.w2_scale, quantization),
        Routed(tensors.topk_ids, tensors.topk_weights),
        out,
        plan,
        routed_scaling_factor=routed_scaling_factor,
    )


def result(tensors: LayerTensors, quantization: Quantization, plan: FewTokensConfig) -> torch.Tensor:
    """[tokens, hidden]."""
    import torch

    out = torch.empty_like(tensors.hidden)
    run(tensors, quantization, plan, out)
    return out
