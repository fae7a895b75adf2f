"""A layer by DeepGEMM's grouped contiguous GEMMs, with our sort, quantization, SwiGLU and sum around them. Hopper.

Its rows are gathered before the up GEMM, in blocks of 128 rows of one expert, as it reads them. Block-wise float8 or
bfloat16; its own just-in-time compiler runs at the first launch of a shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_moe_ext.core import MoEShape
from sglang_moe_ext.engines.libraries.layer_library import RunLayer
from sglang_moe_ext.engines.tensors import LayerTensors
from sglang_moe_ext.kernel_plans import MOST_SORTED_EXPERTS, SCALE_GROUP

if TYPE_CHECKING:
    import torch

_BLOCK = 128


class DeepGemm:
    TITLE = "DeepGEMM"
    PACKAGE = "sgl-deep-gemm"
    MODULE = "deep_gemm"

    def why_unsupported(self, shape: MoEShape) -> str | None:
        if shape.quantization.scheme is not None and not shape.quantization.is_block_wise:
            return f"it has no grouped GEMM for weights of {shape.quantization}"
        if shape.dtype != "bfloat16" or shape.experts > MOST_SORTED_EXPERTS:
            return f"it is for bfloat16 and up to {MOST_SORTED_EXPERTS} experts here"
        return None

    def prepare(self, shape: MoEShape, tensors: LayerTensors) -> RunLayer:
        import torch

        from sglang_moe_ext.kernels import gather_sum, sort_tokens, swiglu

        is_float8 = shape.quantization.is_block_wise

        def run(batch: LayerTensors) -> torch.Tensor:
            pairs, hidden = batch.topk_ids.numel(), batch.hidden
            made = sort_tokens.launch_sort(batch.topk_ids, shape.experts, _BLOCK)
            owners = made.experts.repeat_interleave(_BLOCK)
            tokens = (made.ids.clamp(0, pairs - 1) // shape.top_k).long()
            rows = tokens.numel()
            gate_up = hidden.new_empty(rows, 2 * shape.intermediate_size)
            down = hidden.new_empty(rows, shape.hidden_size)
            if is_float8:
                values = torch.empty_like(hidden, dtype=torch.float8_e4m3fn)
                scale = hidden.new_empty(hidden.shape[0], hidden.shape[1] // SCALE_GROUP, dtype=torch.float32)
                swiglu.launch_quantize(hidden, values, scale)
                gathered = values.view(torch.uint8)[tokens].view(torch.float8_e4m3fn)
                _multiply(gathered, scale[tokens], tensors.w1, tensors.w1_scale, gate_up, owners)
                inner = gathered.new_empty(rows, shape.intermediate_size)
                inner_scale = hidden.new_empty(rows, shape.intermediate_size // SCALE_GROUP, dtype=torch.float32)
                swiglu.launch_swiglu(gate_up, made.padded, inner, scales=inner_scale)
                _multiply(inner, inner_scale, tensors.w2, tensors.w2_scale, down, owners)
            else:
                _multiply(hidden[tokens], None, tensors.w1, None, gate_up, owners)
                inner = hidden.new_empty(rows, shape.intermediate_size)
                swiglu.launch_swiglu(gate_up, made.padded, inner)
                _multiply(inner, None, tensors.w2, None, down, owners)
            out = torch.empty_like(hidden)
            assert made.positions is not None
            gather_sum.launch_gather_sum(down, made.positions, batch.topk_weights, out)
            return out

        return run


def _multiply(
    a: torch.Tensor,
    a_scale: torch.Tensor | None,
    weights: torch.Tensor,
    weight_scale: torch.Tensor | None,
    out: torch.Tensor,
    owners: torch.Tensor,
) -> None:
    """out [rows, N] of `a` [rows, K] and the weights [experts, N, K] of each row's owner."""
    import deep_gemm

    if a_scale is None:
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(a, weights, out, owners)
        return
    by_column = a_scale.T.contiguous().T
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        (a, by_column), (weights, weight_scale), out, owners, disable_ue8m0_cast=True
    )
