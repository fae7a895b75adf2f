"""The up projection into the order of the experts (Hopper), with SwiGLU and float8 quantisation in it or without.

The weights stay as the engine has them: [E, 2 * columns, K], the gate's rows first. Nothing here allocates or waits.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sglang_moe_ext.core import MoEExtError, Quantisation
from sglang_moe_ext.kernels import tma_operands as tma
from sglang_moe_ext.kernels.launching import launch
from sglang_moe_ext.kernels.scales import Scales
from sglang_moe_ext.kernels.sorted_activation import GROUP, LARGEST_FP8, LEAST_SCALE
from sglang_moe_ext.kernels.sorted_up_kernel import sorted_up_kernel
from sglang_moe_ext.sorted_path import UpConfig


def launch_up(
    a: Tensor,
    weights: Tensor,
    out: Tensor,
    sorted_token_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    config: UpConfig,
    *,
    pairs: int,
    top_k: int,
    align_block_m: int,
    scales: Scales | None = None,
    out_scale: Tensor | None = None,
) -> None:
    """out [rows, columns] = silu(gate) * up, of `a` [tokens, K] gathered into the order of sorted_token_ids.

    Where the configuration is not fused, out is [rows, 2 * columns]: gate and up.

    `pairs` = tokens * top_k. `scales` block-wise float8 of `a` and `weights`. With `out_scale` float32
    [rows, columns / 128] out is float8_e4m3fn, as `sorted_activation` makes it. Rows of padding come to hold anything.

    Raises: MoEExtError where tiles, scales and alignment do not go together.
    """
    arguments = up_arguments(
        a, weights, out, sorted_token_ids, expert_ids, num_tokens_post_padded, config,
        pairs=pairs, top_k=top_k, align_block_m=align_block_m, scales=scales, out_scale=out_scale,
    )  # fmt: skip
    tiles = expert_ids.numel() * arguments["TILES_PER_BLOCK"] * -(-out.shape[1] // config.block_n)
    crew = tma.multiprocessors(a.device) * config.programs_per_sm
    launch(sorted_up_kernel, (min(tiles, crew) if config.persistent else tiles,), arguments)


def up_arguments(
    a: Tensor,
    weights: Tensor,
    out: Tensor,
    sorted_token_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    config: UpConfig,
    *,
    pairs: int,
    top_k: int,
    align_block_m: int,
    scales: Scales | None,
    out_scale: Tensor | None,
) -> dict[str, Any]:
    """Every argument and option of the kernel, by name; no value of a tensor is read, so meta tensors do."""
    k, columns = weights.shape[2], out.shape[1]
    quantisation = Quantisation() if scales is None else scales.quantisation
    group_n, group_k = quantisation.block_shape or (0, 0)
    _check(a, weights, out, config, align_block_m, quantisation, out_scale)
    a_scale, b_scale = (None, None) if scales is None else (scales.activations, scales.weights)
    return {
        "a_ptr": a,
        "b_desc": _weights_descriptor(weights, config, is_scaled=scales is not None),
        "c_desc": tma.descriptor(out, config.block_m, config.block_n // (2 if config.half_stores else 1)),
        "a_scale_ptr": a_scale,
        "b_scale_ptr": b_scale,
        "c_scale_ptr": out_scale,
        "sorted_token_ids_ptr": sorted_token_ids,
        "expert_ids_ptr": expert_ids,
        "num_tokens_post_padded_ptr": num_tokens_post_padded,
        "pairs": pairs,
        "columns": columns,
        "K": k,
        "group_m": config.group_m,
        "stride_am": a.stride(0),
        **tma.scale_strides(a_scale, b_scale),
        "stride_cs": 0 if out_scale is None else out_scale.stride(0),
        "BLOCK_SIZE_M": config.block_m,
        "BLOCK_SIZE_N": config.block_n,
        "BLOCK_SIZE_K": config.block_k,
        "TILES_PER_BLOCK": align_block_m // config.block_m,
        "TOP_K": top_k,
        "IS_BLOCK_SCALED": scales is not None,
        "GROUP_N": group_n,
        "GROUP_K": group_k,
        "IS_FUSED": config.is_fused,
        "HALF_STORES": config.half_stores,
        "QUANTISES": out_scale is not None,
        "LEAST_SCALE": LEAST_SCALE,
        "LARGEST": LARGEST_FP8,
        "PERSISTENT": config.persistent,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _weights_descriptor(weights: Tensor, config: UpConfig, *, is_scaled: bool) -> TensorDescriptor:
    """Where fused, over gates and ups as they alternate [2 * E, columns, K]: a box holds both, or one where scaled."""
    if not config.is_fused:
        return tma.descriptor(weights, 1, config.block_n, config.block_k)
    experts, rows, k = weights.shape
    halves = weights.view(2 * experts, rows // 2, k)
    return tma.descriptor(halves, 1 if is_scaled else 2, config.block_n, config.block_k)


def _check(
    a: Tensor,
    weights: Tensor,
    out: Tensor,
    config: UpConfig,
    align_block_m: int,
    quantisation: Quantisation,
    out_scale: Tensor | None,
) -> None:
    _, rows_of_b, k = weights.shape
    columns = out.shape[1]
    if (
        rows_of_b != (2 if config.is_fused else 1) * columns
        or a.shape[1] != k
        or columns % config.block_n
        or k % config.block_k
    ):
        raise MoEExtError(
            f"a {tuple(a.shape)}, weights {tuple(weights.shape)}, out {tuple(out.shape)} with tiles of "
            f"{config.block_n} columns and {config.block_k} along K: expected whole tiles of [tokens, K], [E, N, K]"
        )
    if quantisation.scheme is not None and not quantisation.is_block_wise:
        raise MoEExtError(f"the fused up projection cannot do {quantisation}: give it 16 bits or block-wise fp8_w8a8")
    if out_scale is not None and (config.block_n != GROUP or not config.is_fused):
        raise MoEExtError(f"block_n={config.block_n}: a tile that is quantised has the {GROUP} columns of one scale")
    tile = (config.block_m, config.block_n, config.block_k)
    tma.check_tile(tile, k, align_block_m, quantisation, a.device, groups_of_columns=1)
