"""A MoE layer for few tokens in two launches: no sort, no scatter, no sum pass.

`up`: SwiGLU(hidden @ w1.T) times the router's weight, straight from topk_ids. `down`: act @ w2.T, summed over a token's
experts in a fixed order, so that the same inputs give the same bits. `reference.moe_layer` is the meaning.

Weights are read in the form the engines store them. Activations are not quantized in any scheme: that is nearer to
what the weights mean, and the weights' bytes are the limit. On the matrix units float8 is multiplied as float16, to
which the hardware converts it; there a bfloat16 activation beyond 65504 is inf, unless `wide_range` is configured.

Nothing here waits, and the grid depends on shapes alone, so a CUDA graph can hold both launches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from sglang_moe_ext.core import MoEExtError, Quantization
from sglang_moe_ext.few_tokens_config import FewTokensConfig, FewTokensProblem, refusals
from sglang_moe_ext.kernels import dependent_launch
from sglang_moe_ext.kernels.few_tokens_kernel import down_kernel, up_kernel
from sglang_moe_ext.kernels.launcher import launch

_PLANNED_AT_ONCE = 2048
"""Elements of the comparison of ids with candidates that one step of the plan holds in registers."""
_FIRST_FLOAT8_SM = 89
_NOT_QUANTIZED = Quantization()
_STORED = {
    torch.bfloat16: "same",
    torch.float16: "same",
    torch.float8_e4m3fn: "float8",
    torch.int8: "int8",
    torch.uint8: "uint8",
}


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One projection of all experts, [experts, N, K] as `quantize` lays it out, with its scales if it has any."""

    values: Tensor
    scale: Tensor | None = None
    quantization: Quantization = _NOT_QUANTIZED


@dataclass(frozen=True, slots=True)
class Routed:
    """What the router says: ids int32 or int64 [tokens, top_k], -1 for an expert elsewhere; weights, the same shape."""

    ids: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class Workspace:
    """Between the launches: `act` in the activations' dtype; `plan` int16, for `down`, where the pairs are grouped.

    Where `down` is split: `parts` float32 [split, tokens, hidden_size], and how many of each have `arrived`, int32.
    """

    act: Tensor
    plan: Tensor | None = None
    parts: Tensor | None = None
    arrived: Tensor | None = None


def workspace(hidden: Tensor, w1: Tensor, topk_ids: Tensor, config: FewTokensConfig) -> Workspace:
    """Uninitialised, of the sizes that both launches take; nothing in it outlives the layer."""
    pairs, experts, columns = topk_ids.numel(), w1.shape[0], w1.shape[1] // 2
    rows, plan, parts, arrived = pairs, None, None, None
    if config.grouped:
        candidates, tile_rows = min(pairs, experts), config.up.rows
        rows = candidates * tile_rows
        plan = hidden.new_empty(1 + candidates * (2 + -(-tile_rows // 16)), dtype=torch.int16)
    if config.down.split > 1:
        parts = hidden.new_empty(config.down.split, *hidden.shape, dtype=torch.float32)
        arrived = hidden.new_empty(_results(config, *hidden.shape), dtype=torch.int32)
    return Workspace(hidden.new_empty(rows, columns), plan, parts, arrived)


def _results(config: FewTokensConfig, tokens: int, hidden_size: int) -> int:
    """Tiles of `down`, not counting parts."""
    return -(-hidden_size // config.down.columns) * (1 if config.grouped else tokens)


def few_tokens_layer(
    hidden: Tensor,
    w1: ExpertWeights,
    w2: ExpertWeights,
    routed: Routed,
    out: Tensor,
    config: FewTokensConfig,
    *,
    routed_scaling_factor: float = 1.0,
    weighs_input: bool = False,
) -> None:
    """Write [tokens, hidden_size] to `out`, which may be `hidden` itself.

    Args:
        hidden: bfloat16 or float16 [tokens, hidden_size].
        w1: [experts, 2 * intermediate_size, hidden_size], gate first.
        w2: [experts, hidden_size, intermediate_size].
        weighs_input: the router's weight multiplies gate and up instead of the activation.

    Raises:
        MoEExtError: the tensors or the configuration do not go together.
    """
    between = workspace(hidden, w1.values, routed.ids, config)
    few_tokens_up(hidden, w1, routed, between, config, weighs_input=weighs_input)
    few_tokens_down(between, w2, routed, out, config, routed_scaling_factor=routed_scaling_factor)


def few_tokens_up(
    hidden: Tensor,
    w1: ExpertWeights,
    routed: Routed,
    between: Workspace,
    config: FewTokensConfig,
    *,
    weighs_input: bool = False,
) -> None:
    """Fill `between`; see `few_tokens_layer`."""
    arguments = up_arguments(hidden, w1, routed, between, config, weighs_input=weighs_input)
    tiles = -(-arguments["columns"] // config.up.columns)
    programs = arguments["candidates"] + 1 if config.grouped else routed.ids.numel()
    if programs and hidden.shape[0]:
        launch(up_kernel, (programs, tiles), arguments)


def few_tokens_down(
    between: Workspace,
    w2: ExpertWeights,
    routed: Routed,
    out: Tensor,
    config: FewTokensConfig,
    *,
    routed_scaling_factor: float = 1.0,
) -> None:
    """Write `out` from what `few_tokens_up` left in `between`, as the very next launch of the stream.

    With programmatic dependent launch it starts while `up` runs, so no launch may come in between.
    """
    arguments = down_arguments(between, w2, routed, out, config, routed_scaling_factor=routed_scaling_factor)
    tiles = -(-out.shape[1] // config.down.columns)
    if out.shape[0]:
        launch(down_kernel, (1 if config.grouped else out.shape[0], tiles, config.down.split), arguments)


def up_arguments(
    hidden: Tensor,
    w1: ExpertWeights,
    routed: Routed,
    between: Workspace,
    config: FewTokensConfig,
    *,
    weighs_input: bool = False,
    sm: int | None = None,
) -> dict[str, Any]:
    """Every argument and option of `up_kernel`, by name; no value of a tensor is read, so meta tensors do."""
    ids, stored = routed.ids, w1.values
    tokens, k = hidden.shape
    experts, twice, _ = stored.shape
    _check_tensors(hidden, w1, routed, k)
    sm = _sm(hidden.device) if sm is None else sm
    fixed = _up_constants(config, w1.quantization, stored.dtype, tokens, ids.shape[1], experts, twice // 2, k, sm)
    strides = _scale_strides(w1.scale)
    return {
        "x_ptr": hidden,
        "w_ptr": stored.view(torch.uint8) if stored.dtype == torch.float8_e4m3fn else stored,
        "scale_ptr": w1.scale,
        "ids_ptr": ids,
        "routed_weights_ptr": routed.weights,
        "act_ptr": between.act,
        "plan_ptr": between.plan,
        "arrived_ptr": between.arrived,
        "tokens": tokens,
        "candidates": min(ids.numel(), experts) if config.grouped else 0,
        "counters": 0 if between.arrived is None else between.arrived.numel(),
        "K": k,
        "columns": twice // 2,
        "stride_x": hidden.stride(0),
        "stride_we": stored.stride(0),
        "stride_wn": stored.stride(1),
        "stride_se": strides[0],
        "stride_sn": strides[1],
        "stride_sk": strides[2],
        **fixed,
        "WEIGHS_INPUT": weighs_input,
    }


def down_arguments(
    between: Workspace,
    w2: ExpertWeights,
    routed: Routed,
    out: Tensor,
    config: FewTokensConfig,
    *,
    routed_scaling_factor: float = 1.0,
    sm: int | None = None,
) -> dict[str, Any]:
    """Every argument and option of `down_kernel`, by name; no value of a tensor is read, so meta tensors do."""
    ids, stored, act = routed.ids, w2.values, between.act
    tokens, columns = out.shape
    k = act.shape[1]
    _check_tensors(out, w2, routed, k)
    sm = _sm(out.device) if sm is None else sm
    fixed = _down_constants(config, w2.quantization, stored.dtype, tokens, ids.shape[1], columns, k, sm)
    strides = _scale_strides(w2.scale)
    return {
        "act_ptr": act,
        "w_ptr": stored.view(torch.uint8) if stored.dtype == torch.float8_e4m3fn else stored,
        "scale_ptr": w2.scale,
        "ids_ptr": ids,
        "plan_ptr": between.plan,
        "arrived_ptr": between.arrived,
        "parts_ptr": between.parts,
        "out_ptr": out,
        "tokens": tokens,
        "K": k,
        "columns": columns,
        "routed_scaling_factor": routed_scaling_factor,
        "stride_out": out.stride(0),
        "stride_we": stored.stride(0),
        "stride_wn": stored.stride(1),
        "stride_se": strides[0],
        "stride_sn": strides[1],
        "stride_sk": strides[2],
        **fixed,
    }


@lru_cache(maxsize=4096)
def _up_constants(
    config: FewTokensConfig,
    quantization: Quantization,
    dtype: torch.dtype,
    tokens: int,
    top_k: int,
    experts: int,
    columns: int,
    k: int,
    sm: int,
) -> dict[str, Any]:
    _check_config(config, FewTokensProblem(tokens, top_k, columns, k, quantization), dtype, sm)
    tile, slots = config.up, triton.next_power_of_2(top_k)
    return {
        "TOP_K": top_k,
        "SLOTS": slots,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "BLOCK_K": tile.block_k,
        "STAGES": tile.num_stages,
        "GROUPED": config.grouped,
        "BY_EXPERT": config.grouped and experts <= tokens * top_k,
        "PLAN_CHUNK": max(2, _PLANNED_AT_ONCE // (tile.rows * slots)),
        **_scaling(quantization, dtype, sm, wide_range=config.wide_range and tile.rows > 1),
        "EVEN_K": k % tile.block_k == 0,
        "PDL": dependent_launch.is_available(sm),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


@lru_cache(maxsize=4096)
def _down_constants(
    config: FewTokensConfig,
    quantization: Quantization,
    dtype: torch.dtype,
    tokens: int,
    top_k: int,
    columns: int,
    k: int,
    sm: int,
) -> dict[str, Any]:
    _check_config(config, FewTokensProblem(tokens, top_k, k, columns, quantization), dtype, sm)
    tile, pdl = config.down, dependent_launch.is_available(sm)
    row_bytes = k // 2 if quantization.weight_bits == 4 else k * dtype.itemsize
    return {
        "TOP_K": top_k,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "BLOCK_K": tile.block_k,
        "STEPS": -(-k // tile.block_k),
        "STAGES": tile.num_stages,
        "GROUPED": config.grouped,
        **_scaling(quantization, dtype, sm, wide_range=config.wide_range and tile.rows > 1),
        "EVEN_K": k % tile.block_k == 0,
        "PDL": pdl,
        "SPLIT": tile.split,
        "PREFETCHED": tile.prefetched if pdl else 0,
        "LINES": triton.next_power_of_2(-(-row_bytes // 128)),
        "ROW_BYTES": row_bytes,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **(dependent_launch.OPTIONS if pdl else {}),
    }


def _scaling(quantization: Quantization, dtype: torch.dtype, sm: int, *, wide_range: bool) -> dict[str, Any]:
    """STORED, SCALING, GROUP_N and GROUP_K of the device code."""
    stored = "int4" if quantization.weight_bits == 4 else _STORED[dtype]
    if stored == "float8" and sm and (sm < _FIRST_FLOAT8_SM or wide_range):
        stored = "float8_bits"
    if quantization.scheme is None:
        return {"STORED": stored, "SCALING": "none", "GROUP_N": 1, "GROUP_K": 1}
    if quantization.block_shape is None:
        return {"STORED": stored, "SCALING": "row", "GROUP_N": 1, "GROUP_K": 1}
    group_n, group_k = quantization.block_shape
    return {
        "STORED": stored,
        "SCALING": "block" if group_n else "group",
        "GROUP_N": group_n or 1,
        "GROUP_K": group_k,
    }


def _scale_strides(scale: Tensor | None) -> tuple[int, int, int]:
    """Of [experts, N groups, K groups]; 0 along what a scale does not have."""
    if scale is None:
        return 0, 0, 0
    strides = scale.stride()
    if len(strides) == 1:
        return strides[0], 0, 0
    return strides[0], strides[1], strides[2] if scale.shape[2] > 1 else 0


def _check_config(config: FewTokensConfig, problem: FewTokensProblem, dtype: torch.dtype, sm: int) -> None:
    broken = refusals(config, problem)
    if broken:
        raise MoEExtError(f"{config} for {problem}: this configuration is refused: {broken[0].why}; take another tile")
    if dtype not in _STORED:
        raise MoEExtError(f"weights of {dtype}: expected one of {', '.join(map(str, _STORED))}; take the engine's path")


def _check_tensors(rows: Tensor, weights: ExpertWeights, routed: Routed, k: int) -> None:
    """`rows`: [tokens, hidden_size] of the layer's input or of its result."""
    ids, stored = routed.ids, weights.values
    stored_k = k // 2 if weights.quantization.weight_bits == 4 else k
    if ids.shape != routed.weights.shape or ids.shape[0] != rows.shape[0] or stored.shape[2] != stored_k:
        raise MoEExtError(
            f"rows {tuple(rows.shape)}, weights {tuple(stored.shape)}, ids {tuple(ids.shape)}, router's weights "
            f"{tuple(routed.weights.shape)}: expected [tokens, hidden], [experts, N, {stored_k}], [tokens, top_k] twice"
        )
    if not (ids.is_contiguous() and routed.weights.is_contiguous() and stored.is_contiguous() and rows.stride(1) == 1):
        raise MoEExtError("few_tokens needs ids, router's weights, experts' weights and rows contiguous")


@lru_cache
def _sm(device: torch.device) -> int:
    """90 for Hopper; 0 where there is no GPU, as in Triton's interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
