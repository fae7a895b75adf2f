"""A layer by matmul_ogs of `triton_kernels`, called as SGLang's triton_kernels runner does for 16 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_moe_ext.core import MoEShape
from sglang_moe_ext.engines.libraries.layer_library import RunLayer, why_quantized
from sglang_moe_ext.engines.libraries.pairs_by_expert import PairsByExpert, sort_pairs
from sglang_moe_ext.engines.tensors import LayerTensors

if TYPE_CHECKING:
    import torch


class TritonKernels:
    TITLE = "triton_kernels matmul_ogs"
    PACKAGE = "python/triton_kernels of Triton's repository; vLLM has a copy"
    MODULE = "triton_kernels.matmul_ogs"

    def why_unsupported(self, shape: MoEShape) -> str | None:
        return "it is for bfloat16 here" if shape.dtype != "bfloat16" else why_quantized(shape)

    def prepare(self, shape: MoEShape, tensors: LayerTensors) -> RunLayer:
        import torch
        from triton_kernels.matmul_ogs import matmul_ogs

        up, down = (weights.transpose(1, 2).contiguous() for weights in (tensors.w1, tensors.w2))

        def run(batch: LayerTensors) -> torch.Tensor:
            pairs = sort_pairs(batch.topk_ids, shape.experts)
            routing, gather, scatter = _routing(pairs, batch.topk_weights, shape)
            gate, linear = matmul_ogs(batch.hidden, up, None, routing, gather_indx=gather).chunk(2, dim=-1)
            inner = torch.nn.functional.silu(gate) * linear
            out: torch.Tensor = matmul_ogs(inner, down, None, routing, scatter_indx=scatter, gammas=routing.gate_scal)
            return out

        return run


def _routing(pairs: PairsByExpert, weights: torch.Tensor, shape: MoEShape) -> tuple[Any, Any, Any]:
    """What matmul_ogs reads of a routing: of Triton 3.6's release of it, or of an older one."""
    import torch
    from triton_kernels.matmul_ogs import GatherIndx, RoutingData, ScatterIndx

    row_of_pair = pairs.rows.flatten()
    pair_of_row = torch.empty_like(row_of_pair)
    pair_of_row[row_of_pair] = torch.arange(row_of_pair.numel(), device=row_of_pair.device)
    counts = torch.diff(pairs.bounds)
    try:
        from triton_kernels.tensor import make_ragged_tensor_metadata

        of_experts = make_ragged_tensor_metadata(counts, row_of_pair.numel())
    except ImportError:
        from triton_kernels.routing import compute_expt_data

        of_experts = compute_expt_data(counts, shape.experts, row_of_pair.numel())
    scales = weights.flatten()[pair_of_row]
    routing = RoutingData(scales, counts, shape.experts, shape.top_k, of_experts)
    to_rows, to_pairs = row_of_pair.int(), pair_of_row.int()
    return routing, GatherIndx(to_pairs, to_rows), ScatterIndx(to_rows, to_pairs)
