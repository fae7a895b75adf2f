"""Launch SGLang's own fused-MoE kernel, through its `invoke_fused_moe_kernel`, for one GEMM of a layer."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang_moe_ext.core import EngineError, MoEShape, Projection, TileConfig
from sglang_moe_ext.engines.entries import launched
from sglang_moe_ext.engines.sglang import bootstrap, installation
from sglang_moe_ext.engines.tensors import GemmTensors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Engine:
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


def load() -> Engine:
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
    return Engine(engine.version, kernels, aligner, layer)


def launch(
    engine: Engine,
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
    scheme = shape.quantisation.scheme
    block = shape.quantisation.block_shape
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
        config=launched(config),
        compute_type=tl.bfloat16 if shape.dtype == "bfloat16" else tl.float16,
        use_fp8_w8a8=scheme == "fp8_w8a8",
        use_int8_w8a8=scheme == "int8_w8a8",
        use_int8_w8a16=scheme == "int8_w8a16",
        use_int4_w4a16=scheme == "int4_w4a16",
        per_channel_quant=shape.quantisation.per_channel,
        block_shape=None if block is None else list(block),
        filter_expert=shape.ep > 1,
        a_use_tma=config.use_tma and projection == "down",
        b_use_tma=config.use_tma,
        c_sorted=writes_sorted,
        **({"router_topk": shape.top_k} if has_router_topk else {}),
    )
