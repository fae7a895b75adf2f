"""Compile the two launches for few tokens for a GPU that need not be here. For child processes only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_moe_ext.core import PROJECTIONS, Failure, Resources
from sglang_moe_ext.engines import meta_compile
from sglang_moe_ext.engines.meta_compile import meta
from sglang_moe_ext.engines.tensors import LayerTensors

if TYPE_CHECKING:
    from sglang_moe_ext.few_tokens_config import FewTokensConfig
    from sglang_moe_ext.kernel_plans import SortedKernelJob


def compile_launch(job: SortedKernelJob, plan: FewTokensConfig) -> Resources | Failure:
    """What one launch of the plan needs, the up or the down, or why the compiler refuses it."""
    from sglang_moe_ext.kernels import few_tokens

    few_tokens._sm = lambda _: job.sm  # type: ignore[assignment]
    tensors, quantization = layer_tensors(job), job.shape.quantization
    routed = few_tokens.Routed(tensors.topk_ids, tensors.topk_weights)
    between = few_tokens.workspace(tensors.hidden, tensors.w1, tensors.topk_ids, plan)

    def launch_up() -> None:
        weights = few_tokens.ExpertWeights(tensors.w1, tensors.w1_scale, quantization)
        few_tokens.few_tokens_up(tensors.hidden, weights, routed, between, plan)

    def launch_down() -> None:
        weights = few_tokens.ExpertWeights(tensors.w2, tensors.w2_scale, quantization)
        few_tokens.few_tokens_down(between, weights, routed, tensors.hidden, plan)

    return meta_compile.compile_every_launch(job.target, launch_up if job.projection == "up" else launch_down)


def layer_tensors(job: SortedKernelJob) -> LayerTensors:
    """Those of the layer, without storage."""
    import torch

    (w1, w1_scale), (w2, w2_scale) = (
        meta_compile.weights(job.shape, projection, job.target) for projection in PROJECTIONS
    )
    routed = job.tokens, job.shape.top_k
    return LayerTensors(
        hidden=meta((job.tokens, job.shape.hidden_size), getattr(torch, job.shape.dtype)),
        w1=w1,
        w2=w2,
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        topk_weights=meta(routed, torch.float32),
        topk_ids=meta(routed, torch.int32),
    )
