"""A layer of any engine run by the two launches for few tokens, straight from topk_ids."""

from __future__ import annotations

from dataclasses import replace
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
    [rows, I] of 16 bits; where the plan splits the down GEMM, float32 [split, tokens, hidden] besides.
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


def load(tensors: LayerTensors, quantization: Quantization, plan: FewTokensConfig) -> None:
    """Compile and load what the plan launches for the layer of these tensors, by running it on batches of zeros.

    A binary is for any number of tokens; grouped, there is one for more pairs than experts, and one for fewer.
    """
    for tokens in (1, plan.up.rows) if plan.grouped else (1,):
        result(zeros(tensors, tokens), quantization, plan)


def zeros(tensors: LayerTensors, tokens: int) -> LayerTensors:
    """A batch of so many tokens, of the types of this one, each to the first experts."""
    import torch

    top_k = tensors.topk_ids.shape[1]
    ids = torch.arange(top_k, dtype=tensors.topk_ids.dtype, device=tensors.topk_ids.device)
    return replace(
        tensors,
        hidden=tensors.hidden.new_zeros(tokens, tensors.hidden.shape[1]),
        topk_weights=tensors.topk_weights.new_zeros(tokens, top_k),
        topk_ids=ids.repeat(tokens, 1),
    )


def result(tensors: LayerTensors, quantization: Quantization, plan: FewTokensConfig) -> torch.Tensor:
    """[tokens, hidden]."""
    import torch

    out = torch.empty_like(tensors.hidden)
    run(tensors, quantization, plan, out)
    return out
