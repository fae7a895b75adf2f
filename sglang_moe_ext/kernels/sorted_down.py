"""The down projection of rows sorted by expert, through TMA (Hopper and newer); `sorted_reference.down` is its meaning.

Nothing here allocates or waits, so a CUDA graph can hold it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sglang_moe_ext.core import Quantisation
from sglang_moe_ext.kernels import tma_operands as tma
from sglang_moe_ext.kernels.launching import launch
from sglang_moe_ext.kernels.scales import Scales
from sglang_moe_ext.kernels.sorted_down_kernel import sorted_down_kernel
from sglang_moe_ext.sorted_path import DownConfig


def launch_down(
    a: Tensor,
    weights: Tensor,
    out: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    config: DownConfig,
    *,
    align_block_m: int,
    scales: Scales | None = None,
    experts_elsewhere: bool = False,
) -> None:
    """out [rows, N] = each row of `a` [rows, K] times the weights [N, K] of its block's expert; `weights` [E, N, K].

    Rows are in the order of sorted_token_ids, in blocks of `align_block_m`; tiles after num_tokens_post_padded are left
    alone. Rows of padding may hold anything and come to hold anything, and so do those of expert -1, which
    `experts_elsewhere` skips. scales.activations has one row for each row of `a`, or is one number.

    Raises: MoEExtError where TMA, tiles, scales and alignment do not go together.
    """
    arguments = kernel_arguments(
        a,
        weights,
        out,
        expert_ids,
        num_tokens_post_padded,
        config,
        align_block_m=align_block_m,
        scales=scales,
        experts_elsewhere=experts_elsewhere,
    )
    tiles = expert_ids.numel() * arguments["TILES_PER_BLOCK"] * -(-weights.shape[1] // config.block_n)
    crew = tma.multiprocessors(a.device) * config.programs_per_sm
    launch(sorted_down_kernel, (min(tiles, crew) if config.persistent else tiles,), arguments)


def kernel_arguments(
    a: Tensor,
    weights: Tensor,
    out: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    config: DownConfig,
    *,
    align_block_m: int,
    scales: Scales | None,
    experts_elsewhere: bool,
) -> dict[str, Any]:
    """Every argument and option of the kernel, by name; no value of a tensor is read, so meta tensors do."""
    _, columns, k = weights.shape
    quantisation = Quantisation() if scales is None else scales.quantisation
    group_n, group_k = quantisation.block_shape or (0, 0)
    tile = (config.block_m, config.block_n, config.block_k)
    tma.check_tensors(a, weights, out)
    tma.check_tile(tile, k, align_block_m, quantisation, a.device, groups_of_columns=2)
    two_groups = 0 < group_n < config.block_n
    stored_n = config.block_n // 2 if two_groups or config.half_stores else config.block_n
    a_scale, b_scale = (None, None) if scales is None else (scales.activations, scales.weights)
    return {
        "a_desc": tma.descriptor(a, config.block_m, config.block_k),
        "b_desc": tma.descriptor(weights, 1, group_n if two_groups else config.block_n, config.block_k),
        "c_desc": tma.descriptor(out, config.block_m, stored_n),
        "a_scale_ptr": a_scale,
        "b_scale_ptr": b_scale,
        "expert_ids_ptr": expert_ids,
        "num_tokens_post_padded_ptr": num_tokens_post_padded,
        "N": columns,
        "K": k,
        "group_m": config.group_m,
        **tma.scale_strides(a_scale, b_scale),
        "BLOCK_SIZE_M": config.block_m,
        "BLOCK_SIZE_N": config.block_n,
        "BLOCK_SIZE_K": config.block_k,
        "TILES_PER_BLOCK": align_block_m // config.block_m,
        "SCALING": tma.scaling_of(quantisation),
        "GROUP_N": group_n,
        "GROUP_K": group_k,
        "HALF_STORES": config.half_stores,
        "EXPERTS_ELSEWHERE": experts_elsewhere,
        "PERSISTENT": config.persistent,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
