"""Child, under TRITON_INTERPRET=1: the layer of the vLLM on PYTHONPATH, run on the CPU, held against our reference.

stdin: [{"shape": <MoEShape as a dict>, "tokens": M, "config": [...]}]. Last line of stdout: for each, the relative
errors {"up": of the up GEMM alone, "layer": of the whole layer, "sorted": whether tokens were sorted}.

vLLM's compiled operators cannot run here: the sort, the activation, the quantization and the sum over a token's experts
are stood in for by plain torch, with the meaning that vLLM's own documentation gives them. Kernels, launchers and what
the layer does between them are vLLM's own.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from sglang_moe_ext.core import MoEShape, Quantization, TileConfig
from sglang_moe_ext.engines.registry import VLLM
from sglang_moe_ext.kernels import reference
from sglang_moe_ext.kernels.quantize import Scales, quantize_activations
from sglang_moe_ext.tuning.bench.layer import BenchedLayer
from sglang_moe_ext.tuning.bench.routing import MIXED
from tests.kernels.interpreter import repair


def align(
    topk_ids: torch.Tensor,
    experts: int,
    block: int,
    sorted_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    padded: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    *_: None,
) -> None:
    """Pairs by expert, each expert's padded to whole blocks by a number that is no pair's; those elsewhere left out."""
    ids = topk_ids.flatten().long()
    places = ids if expert_map is None else expert_map[ids].long()
    sorted_ids.fill_(ids.numel())
    at = 0
    for expert in range(experts):
        pairs = (places == expert).nonzero().flatten()
        blocks = -(-len(pairs) // block)
        sorted_ids[at : at + len(pairs)] = pairs
        expert_ids[at // block : at // block + blocks] = expert
        at += blocks * block
    padded.fill_(at)


def activate(activation: Any, out: torch.Tensor, of: torch.Tensor, **_: Any) -> None:
    if activation.value == "relu2_no_mul":
        out.copy_(of.float().relu().square())
    else:
        gate, linear = of.float().chunk(2, dim=-1)
        out.copy_(torch.nn.functional.silu(gate) * linear)


def quantized_as(quantization: Quantization) -> Any:
    def quantize(A: torch.Tensor, quant_dtype: Any, **_: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        return (A, None) if quant_dtype is None else quantize_activations(A, quantization)

    return quantize


def answer(engine: Any, case: dict[str, Any]) -> dict[str, Any]:
    stated = dict(case["shape"])
    said = {name: tuple(of) if isinstance(of, list) else of for name, of in stated.pop("quantization").items()}
    quantization, config, tokens = Quantization(**said), TileConfig(*case["config"]), case["tokens"]
    shape = MoEShape(quantization=quantization, **stated)
    engine.kernels.moe_kernel_quantize_input = quantized_as(quantization)
    layer = BenchedLayer(engine, shape, MIXED, seed=1, device="cpu", adapter=VLLM)
    batch = layer.batch(tokens, seed=2)
    up = layer.gemm(batch, "up", config, turn=0)
    up.out.fill_(float("nan"))
    VLLM.launch(engine, shape, "up", up, config)
    ids = batch.routings[0].topk_ids
    local = ids.masked_fill(ids >= shape.experts, -1)
    scale = layer.weights["up"].scale
    rows, scales = (batch.hidden, None)
    if scale is not None:
        quantizes = quantization.activation_bits == 8
        rows, of_rows = quantize_activations(batch.hidden, quantization) if quantizes else (batch.hidden, None)
        scales = Scales(quantization, of_rows, scale)
    expected = reference.grouped_gemm(rows, up.weights, local, top_k=shape.top_k, scales=scales)
    mine = (local >= 0).flatten()
    found = up.out.flatten(0, 1)
    run = VLLM.run_layer(engine, shape, layer.whole(batch, 0), config, config)
    return {
        "up": reference.relative_error(found[mine], expected[mine]),
        "layer": layer.error(batch, 0, run),
        "sorted": up.sorted_token_ids is not None,
    }


def main() -> None:
    repair()
    engine: Any = VLLM.load()
    engine.kernels.ops.moe_align_block_size = align
    engine.kernels.ops.moe_sum = lambda of, out, *_: out.copy_(of.float().sum(dim=1))
    engine.kernels.apply_moe_activation = activate
    print(json.dumps([answer(engine, case) for case in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
