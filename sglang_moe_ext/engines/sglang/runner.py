"""Launch SGLang's own fused-MoE kernel, through its `invoke_fused_moe_kernel`, for one GEMM of a layer."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sglang_moe_ext.core import EngineError, MoEShape, Projection, TileConfig
from sglang_moe_ext.engines.config_dict import config_dict_of, launch_args
from sglang_moe_ext.engines.sglang import bootstrap, installation
from sglang_moe_ext.engines.tensors import GemmTensors, LayerTensors
from sglang_moe_ext.schemes import SCHEMES

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class LoadedSglang:
    """The modules of the engine that a launch needs: the GEMM kernels, the sort of the tokens, the whole layer."""

    version: tuple[int, int, int]
    kernels: Any
    aligner: Any
    layer: Any

    def align(
        self, topk_ids: torch.Tensor, block_m: int, experts: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sorted_token_ids, expert_ids, num_tokens_post_padded), as the engine's own sort makes them."""
        sorted_token_ids, expert_ids, num_tokens_post_padded = self.aligner.moe_align_block_size(
            topk_ids, block_m, experts
        )
        return sorted_token_ids, expert_ids, num_tokens_post_padded

    def launch_sorted_up(self, shape: MoEShape, tensors: GemmTensors, config: TileConfig) -> None:
        """The up GEMM, its rows in the order of the experts."""
        launch(self, shape, "up", tensors, config, writes_sorted=True)


def load() -> LoadedSglang:
    """Import the installed engine's kernel and give it the server arguments that it asks for.

    Raises:
        EngineError: there is no engine, or it cannot be imported.
    """
    engine = installation.find()
    if engine is None:
        raise EngineError("SGLang is not installed in this environment")
    kernels = bootstrap.import_engine(engine.kernel_module)
    aligner = bootstrap.import_engine(engine.align_module)
    layer = bootstrap.import_engine(engine.layer_module)
    bootstrap.publish_server_args()
    return LoadedSglang(engine.version, kernels, aligner, layer)


def launch(
    engine: LoadedSglang,
    shape: MoEShape,
    projection: Projection,
    tensors: GemmTensors,
    config: TileConfig,
    *,
    writes_sorted: bool = False,
) -> None:
    """Run one GEMM through the engine's launcher. Writes `tensors.out`.

    With TMA the up GEMM takes B by descriptor; the down GEMM takes A too, which is then in the order of the experts:
    for its sake the up GEMM before it `writes_sorted`.
    """
    import triton.language as tl

    invoke = engine.kernels.invoke_fused_moe_kernel
    # A constant of the kernel since 0.5.10, which the layer states for the down GEMM whether it is used or not.
    has_router_topk = projection == "down" and "router_topk" in inspect.signature(invoke).parameters
    scheme = shape.quantization.scheme
    block = shape.quantization.block_shape
    invoke(
        A=tensors.a,
        B=tensors.weights,
        bias=None,
        C=tensors.out,
        A_scale=None,
        B_scale=tensors.weight_scale,
        B_zp=None,
        topk_weights=tensors.topk_weights,
        topk_ids=tensors.topk_ids,
        sorted_token_ids=tensors.sorted_token_ids,
        expert_ids=tensors.expert_ids,
        num_tokens_post_padded=tensors.num_tokens_post_padded,
        mul_routed_weight=projection == "down",
        top_k=shape.top_k if projection == "up" else 1,
        config=launch_args(config),
        compute_type=tl.bfloat16 if shape.dtype == "bfloat16" else tl.float16,
        **{row.launch_flag: row.name == scheme for row in SCHEMES.values()},
        per_channel_quant=shape.quantization.per_channel,
        block_shape=None if block is None else list(block),
        filter_expert=shape.ep > 1 or shape.zero_experts > 0,
        a_use_tma=config.use_tma and projection == "down",
        b_use_tma=config.use_tma,
        c_sorted=writes_sorted,
        **({"router_topk": shape.top_k} if has_router_topk else {}),
    )


def warm_up(engine: LoadedSglang, shape: MoEShape) -> None:
    """Have the activation compiled: the engine calls the CUDA compiler, for seconds, when it is first needed."""
    import torch

    if shape.gated:
        gate_and_up = torch.zeros(1, shape.gemm("up")[0], dtype=getattr(torch, shape.dtype), device="cuda")
        engine.layer.silu_and_mul(gate_and_up, torch.empty_like(gate_and_up[:, : shape.intermediate_size]).contiguous())


def alone(layer: Any) -> None:
    """Put in place what the layer asks of a server: there is none in this process."""
    # At few tokens the engine sums by a function that torch.compile has to make first, seconds for each batch size.
    layer.moe_sum_reduce_torch_compile = layer.moe_sum_reduce
    # Since 0.5.18 the output is allocated for the ranks of the server, of which this process has not even one.
    layer.use_symmetric_memory = lambda *_, **__: nullcontext()
    layer.get_tp_group = lambda: None
    layer.get_parallel = lambda: SimpleNamespace(tp_group=None)


def run(engine: LoadedSglang, shape: MoEShape, tensors: LayerTensors, up: TileConfig, down: TileConfig) -> torch.Tensor:
    """[tokens, hidden], by the engine's `fused_experts_impl`."""
    scheme, block = shape.quantization.scheme, shape.quantization.block_shape
    engine.layer.try_get_optimal_moe_config = lambda *_, **__: (config_dict_of(up), (config_dict_of(down), up.block_m))
    alone(engine.layer)
    out: torch.Tensor = engine.layer.fused_experts_impl(
        tensors.hidden,
        tensors.w1,
        tensors.w2,
        tensors.topk_weights,
        tensors.topk_ids,
        is_gated=shape.gated,
        activation="silu" if shape.gated else "relu2",
        **{row.launch_flag: row.name == scheme for row in SCHEMES.values()},
        per_channel_quant=shape.quantization.per_channel,
        w1_scale=tensors.w1_scale,
        w2_scale=tensors.w2_scale,
        block_shape=None if block is None else list(block),
        filter_expert=shape.ep > 1 or shape.zero_experts > 0,
    )
    return out


_ALIGNMENT = 16
"""Triton keeps apart the integers that this divides, and the integer 1."""
_EARLY_DEPENDENTS = 512
"""Since 0.5.19 the kernel has a constant that says whether there are at most so many tokens."""


def _class(shape: MoEShape, tokens: int) -> tuple[object, ...]:
    slots = tokens * shape.top_k
    # The size of the sorted buffer is another function of the slots where there are fewer of them than experts.
    return slots == 1, slots % _ALIGNMENT, slots < shape.experts + 1, tokens <= _EARLY_DEPENDENTS


def representative_tokens(shape: MoEShape, tokens: int) -> int:
    """The smallest batch size whose launch runs the same binary as this one's."""
    wanted = _class(shape, tokens)
    start = _EARLY_DEPENDENTS + 1 if tokens > _EARLY_DEPENDENTS else 1
    return next((m for m in range(start, tokens) if _class(shape, m) == wanted), tokens)
