"""Child of test_dtypes: the SGLang on PYTHONPATH multiplies operands of every scheme, in Triton's interpreter.

stdin: {"gemms": [{"shape", "projection", "tile", "change"}], "names": [{"shape", "device"}]}, shapes as dicts of
`MoEShape`. Last line of stdout: {"errors": [relative error against the reference, null where not finite],
"names": [[name of each table that the engine looks for]]}.

The engine's quantizers of activations are CUDA operators; ours, which are meant to equal them, take their place. So
this shows what the GEMM kernels mean by layouts and scales, and nothing of those operators.
"""

from __future__ import annotations

import ast
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton.runtime.interpreter import ASTTransformer

from sglang_moe_ext.core import MoEShape, Projection, Quantization, TileConfig
from sglang_moe_ext.engines.sglang import bootstrap, installation, runner
from sglang_moe_ext.kernels import reference
from sglang_moe_ext.kernels.quantize import as_the_gemm_reads, quantize_activations, quantize_weights
from tests.kernels.interpreter import repair

TOKENS = 17
SCHEMES = ("fp8_w8a8", "int8_w8a8", "int8_w8a16", "int4_w4a16")


def read_shape(document: dict[str, Any]) -> MoEShape:
    quantization = document["quantization"]
    block = quantization["block_shape"]
    read = Quantization(**quantization | {"block_shape": None if block is None else tuple(block)})
    return MoEShape(**document | {"quantization": read})


def routing(shape: MoEShape) -> Tensor:
    """int32 [tokens, slots]; expert 1 has no token."""
    scores = torch.rand(TOKENS, shape.experts)
    scores[:, 1] = -1.0
    return scores.topk(shape.top_k, dim=1).indices.int()


def operands(shape: MoEShape, projection: Projection) -> tuple[Tensor, Tensor, Tensor | None]:
    """(rows, stored weights, their scale); rows and experts differ in size, so a scale taken for another's shows."""
    dtype, (columns, reduction) = getattr(torch, shape.dtype), shape.gemm(projection)
    rows = TOKENS * (shape.top_k if projection == "down" else 1)
    a = (torch.randn(rows, reduction) * torch.rand(rows, 1).add(0.1)).to(dtype)
    size = torch.arange(1, shape.experts + 1).view(-1, 1, 1) / 4
    plain = (torch.randn(shape.experts, columns, reduction) * size).to(dtype)
    return a, *((plain, None) if shape.quantization.scheme is None else quantize_weights(plain, shape.quantization))


def with_room_behind(tensor: Tensor) -> Tensor:
    """A copy that may be read past its end: the kernel for groups reads whole blocks along K."""
    room = torch.zeros(tensor.numel() * tensor.element_size() + 4096, dtype=torch.uint8).view(tensor.dtype)
    return room[: tensor.numel()].view(tensor.shape).copy_(tensor)


def in_order_of_experts(rows: Tensor, sorted_token_ids: Tensor, filler: float) -> Tensor:
    """The rows as the layer keeps them for a down GEMM with TMA; `filler` stands in those of no pair."""
    padded = torch.cat((rows, torch.full_like(rows[:1], filler)))
    return padded[sorted_token_ids.long()]


def error_of(engine: runner.LoadedSglang, case: dict[str, Any]) -> float | None:
    """Relative error of one GEMM; what the kernel left unwritten is NaN."""
    torch.manual_seed(0)
    shape, projection, change = read_shape(case["shape"]), case["projection"], case["change"]
    tile, top_k = TileConfig(*case["tile"]), shape.top_k if projection == "up" else 1
    topk_ids, topk_weights = routing(shape), torch.rand(TOKENS, shape.top_k)
    a, stored, scale = operands(shape, projection)
    aligned = reference.moe_align(topk_ids, tile.block_m, shape.experts)
    sorted_rows = tile.use_tma and projection == "down" and change != "rows in the order of pairs"
    # What nobody wrote may hold anything.
    filler = torch.finfo(a.dtype).max if change == "unwritten padding" else 0.0
    tensors = runner.GemmTensors(
        a=in_order_of_experts(a, aligned.sorted_token_ids, filler) if sorted_rows else a,
        weights=with_room_behind((stored >> 4) + (stored << 4) if change == "nibbles swapped" else stored),
        out=torch.full((aligned.sorted_token_ids.numel(), stored.shape[1]), math.nan, dtype=a.dtype),
        weight_scale=scale,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        sorted_token_ids=aligned.sorted_token_ids,
        expert_ids=aligned.expert_ids,
        num_tokens_post_padded=aligned.num_tokens_post_padded,
    )
    with our_quantizer(engine.kernels, shape.quantization), told_to_sort(engine.kernels, change == "told to sort"):
        runner.launch(engine, shape, projection, tensors, tile)
    rows, scales = (a, None) if scale is None else as_the_gemm_reads(a, scale, shape.quantization)
    routed = topk_weights if projection == "down" else None
    expected = reference.grouped_gemm(rows, stored, topk_ids, top_k=top_k, scales=scales, routed_weights=routed)
    error = reference.relative_error(tensors.out[: len(expected)], expected)
    return error if math.isfinite(error) else None


@contextmanager
def our_quantizer(kernels: Any, quantization: Quantization) -> Iterator[None]:
    def quantize(a: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return quantize_activations(a, quantization)

    names = ["scaled_fp8_quant", "per_token_quant_int8"]
    names += [f"{prefix}per_token_group_quant_{kind}" for prefix in ("", "sglang_") for kind in ("fp8", "int8")]
    before = {name: getattr(kernels, name) for name in names}
    vars(kernels).update(dict.fromkeys(names, quantize))
    yield
    vars(kernels).update(before)


@contextmanager
def told_to_sort(kernels: Any, told: bool) -> Iterator[None]:
    """Have the launcher ask for rows in the order of the experts, as the layer does for a down GEMM with TMA."""
    invoke = kernels.invoke_fused_moe_kernel
    if told:
        kernels.invoke_fused_moe_kernel = lambda **arguments: invoke(**arguments | {"c_sorted": True})
    yield
    kernels.invoke_fused_moe_kernel = invoke


def names_looked_for(config: Any, case: dict[str, Any]) -> list[str]:
    """The tables that the engine looks for when it is given weights as we store them."""
    shape = read_shape(case["shape"])
    quantization, asked = shape.quantization, []
    stored = [operands(shape, projection)[1] for projection in ("up", "down")]
    answer = config.get_config_file_name

    def note(*arguments: Any, **keywords: Any) -> str:
        asked.append(answer(*arguments, **keywords))
        return str(asked[-1])

    config.get_device_name = lambda *_: case["device"]
    config.get_moe_configs.cache_clear()
    config.get_config_file_name = note
    config.try_get_optimal_moe_config(
        *[tuple(weights.shape) for weights in stored],
        shape.top_k,
        config.get_config_dtype_str(
            dtype=getattr(torch, shape.dtype), **{f"use_{scheme}": scheme == quantization.scheme for scheme in SCHEMES}
        ),
        TOKENS,
        block_shape=None if quantization.block_shape is None else list(quantization.block_shape),
        per_channel_quant=quantization.per_channel,
        return_down_config=True,
    )
    config.get_config_file_name = answer
    return asked


def main(request: dict[str, Any]) -> dict[str, Any]:
    # Compiled, a kernel's asserts are nothing unless TRITON_DEBUG is set; interpreted, they would be Python's.
    ASTTransformer.visit_Assert = lambda _self, node: ast.copy_location(ast.Pass(), node)
    repair()
    found = installation.find()
    assert found is not None
    config = bootstrap.import_engine(found.config_module)
    bootstrap.publish_server_args()
    engine = runner.load() if request["gemms"] else None
    return {
        "errors": [error_of(engine, case) for case in request["gemms"] if engine is not None],
        "names": [names_looked_for(config, case) for case in request["names"]],
    }


if __name__ == "__main__":
    print(json.dumps(main(json.load(sys.stdin))))
