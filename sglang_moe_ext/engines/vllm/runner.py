"""Launch vLLM's own fused-MoE kernel, through its `dispatch_fused_moe_kernel`, for one GEMM of a layer."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang_moe_ext.core import EngineError, MoEShape, Projection, TileConfig
from sglang_moe_ext.engines.tensors import GemmTensors, LayerTensors
from sglang_moe_ext.engines.vllm import bootstrap, installation
from sglang_moe_ext.engines.vllm.launch_args import config_dict_of
from sglang_moe_ext.schemes import SCHEMES

if TYPE_CHECKING:
    import torch

_NO_RANK = -1
"""What an expert map says of an expert that lies on another rank."""


@dataclass(frozen=True, slots=True)
class LoadedVllm:
    """The engine's module of the kernels, their launchers, the sort of the tokens and the whole layer."""

    version: tuple[int, int, int]
    kernels: Any


def load() -> LoadedVllm:
    """Import the installed engine's kernels.

    Raises:
        EngineError: there is no engine, or it cannot be imported.
    """
    import torch

    engine = installation.find()
    if engine is None:
        raise EngineError("vLLM is not installed in this environment")
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")  # it would log to stdout, where answers go
    logging.getLogger("vllm").setLevel(logging.ERROR)  # that there are no compiled operators is known where it matters
    # Where DeepGEMM is there it would round scales of activations to powers of two, which our reference does not; the
    # GEMM is the same.
    os.environ["VLLM_USE_DEEP_GEMM_E8M0"] = "0"
    if not torch.cuda.is_available():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else it takes a Triton that finds no driver for none at all
    kernels = bootstrap.import_engine(installation.LAYER_MODULE)
    # A server of 0.33 runs weights of groups through TritonWNA16Experts at every M; what we call would take a CUDA
    # kernel at few tokens, which reads no table.
    kernels.should_moe_wna16_use_cuda = lambda *_, **__: False
    return LoadedVllm(engine.version, kernels)


def global_experts(shape: MoEShape) -> int:
    """Experts of all ranks, which tokens are sorted by."""
    return shape.experts * shape.ep


def global_ids(shape: MoEShape, topk_ids: torch.Tensor) -> torch.Tensor:
    """The ids as this engine routes, of experts on all ranks, where -1 is an expert elsewhere: those on others in turn.

    What a rank of several sees before its expert map is applied; ours come first.
    """
    import torch

    if shape.ep == 1:
        return topk_ids
    elsewhere = shape.experts * (shape.ep - 1)
    in_turn = torch.arange(topk_ids.numel(), device=topk_ids.device, dtype=topk_ids.dtype).view_as(topk_ids)
    return torch.where(topk_ids < 0, shape.experts + in_turn % elsewhere, topk_ids)


@functools.lru_cache
def expert_map(shape: MoEShape, device: torch.device) -> torch.Tensor | None:
    """int32 [experts of all ranks]: where an expert lies on this rank, or -1. None where there is one rank."""
    import torch

    if shape.ep == 1:
        return None
    places = torch.full((global_experts(shape),), _NO_RANK, dtype=torch.int32, device=device)
    places[: shape.experts] = torch.arange(shape.experts, dtype=torch.int32, device=device)
    return places


def sort(
    engine: LoadedVllm, shape: MoEShape, topk_ids: torch.Tensor, block_m: int
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(sorted_token_ids, expert_ids, num_tokens_post_padded), as the engine's layer makes them.

    Where tokens are few beside the experts it does not sort: sorted_token_ids is None.
    """
    scheme, block = shape.quantization.scheme, shape.quantization.block_shape
    sorted_token_ids, expert_ids, num_tokens_post_padded = engine.kernels._prepare_expert_assignment(
        topk_ids,
        {"BLOCK_SIZE_M": block_m},
        topk_ids.shape[0],
        topk_ids.shape[1],
        global_experts(shape),
        expert_map(shape, topk_ids.device),
        use_int8_w8a16=scheme == "int8_w8a16",
        use_int4_w4a16=scheme == "int4_w4a16",
        block_shape=None if block is None else list(block),
        ignore_invalid_experts=True,
    )
    return sorted_token_ids, expert_ids, num_tokens_post_padded


def flags(shape: MoEShape) -> dict[str, Any]:
    """How the weights are stored, as every launcher of the engine is told."""
    scheme, block = shape.quantization.scheme, shape.quantization.block_shape
    return {
        **{row.launch_flag: row.name == scheme for row in SCHEMES.values()},
        "per_channel_quant": shape.quantization.per_channel,
        "block_shape": None if block is None else list(block),
    }


def _quantized(engine: LoadedVllm, shape: MoEShape, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The activations as the GEMM reads them, and their scales; the engine quantizes them before it launches."""
    import torch

    row, block = shape.quantization.row, shape.quantization.block_shape
    dtype = getattr(torch, row.stored_dtype) if row.stored_dtype and row.activation_bits == 8 else None
    if dtype is torch.float8_e4m3fn:
        dtype = engine.kernels.current_platform.fp8_dtype()  # AMD's kind of it on some of its GPUs
    quantized, scale = engine.kernels.moe_kernel_quantize_input(
        A=a,
        A_scale=None,
        quant_dtype=dtype,
        per_act_token_quant=shape.quantization.per_channel,
        block_shape=None if block is None else list(block),
    )
    return quantized, scale


def launch(
    engine: LoadedVllm, shape: MoEShape, projection: Projection, tensors: GemmTensors, config: TileConfig
) -> None:
    """Run one GEMM through the engine's launcher. Writes `tensors.out`."""
    import triton.language as tl

    a, a_scale = _quantized(engine, shape, tensors.a)
    engine.kernels.dispatch_fused_moe_kernel(
        A=a,
        B=tensors.weights,
        C=tensors.out,
        A_scale=a_scale,
        B_scale=tensors.weight_scale,
        B_zp=None,
        topk_weights=tensors.topk_weights,
        sorted_token_ids=tensors.sorted_token_ids,
        expert_ids=tensors.expert_ids,
        num_tokens_post_padded=tensors.num_tokens_post_padded,
        mul_routed_weight=projection == "down",
        top_k=shape.top_k if projection == "up" else 1,
        config=config_dict_of(config),
        compute_type=tl.bfloat16 if shape.dtype == "bfloat16" else tl.float16,
        **flags(shape),
    )


def run(engine: LoadedVllm, shape: MoEShape, tensors: LayerTensors, up: TileConfig, down: TileConfig) -> torch.Tensor:
    """[tokens, hidden], by the engine's `fused_experts_impl`.

    Raises:
        EngineError: the GEMMs are to run with different configurations: here one serves both.
    """
    if up != down:
        raise EngineError(f"vLLM runs both GEMMs with one configuration: expected the same twice, got {up} and {down}")
    engine.kernels.try_get_optimal_moe_config = lambda *_, **__: config_dict_of(up)
    layer = engine.kernels.fused_experts_impl
    out: torch.Tensor = layer(
        tensors.hidden,
        tensors.w1,
        tensors.w2,
        tensors.topk_weights,
        tensors.topk_ids,
        activation="silu" if shape.gated else "relu2_no_mul",
        global_num_experts=global_experts(shape),
        expert_map=expert_map(shape, tensors.hidden.device),
        w1_scale=tensors.w1_scale,
        w2_scale=tensors.w2_scale,
        **flags(shape),
        **({"inplace": False} if "inplace" in inspect.signature(layer).parameters else {}),  # up to 0.20
    )
    return out


_ALIGNMENT = 16
"""Triton keeps apart the integers that this divides, and the integer 1."""
_SPARSE = 4
"""With so many times more experts than pairs of token and expert, or more yet, tokens are not sorted."""


def _class(shape: MoEShape, tokens: int) -> tuple[object, ...]:
    slots, experts = tokens * shape.top_k, shape.experts * shape.ep
    # The size of the sorted buffer is another function of the slots where there are fewer of them than experts.
    return slots == 1, slots % _ALIGNMENT, slots < experts, shape.ep == 1 and _SPARSE * slots <= experts


def representative_tokens(shape: MoEShape, tokens: int) -> int:
    """The smallest batch size whose launch runs the same binary as this one's."""
    wanted = _class(shape, tokens)
    return next((m for m in range(1, tokens) if _class(shape, m) == wanted), tokens)
