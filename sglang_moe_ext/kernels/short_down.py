"""The down projection of sorted rows where K is at most 512, as tensor parallelism leaves it: A stays, B streams by.

`sorted_reference.down` is its meaning too. Nothing here allocates or waits, so a CUDA graph can hold it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sglang_moe_ext.core import MoEExtError, Quantisation
from sglang_moe_ext.kernels import tma_operands as tma
from sglang_moe_ext.kernels.launching import launch
from sglang_moe_ext.kernels.scales import Scales
from sglang_moe_ext.kernels.short_down_kernel import short_down_kernel
from sglang_moe_ext.sorted_path import LONGEST_K, ShortDownConfig


def launch_short_down(
    a: Tensor,
    weights: Tensor,
    out: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    config: ShortDownConfig,
    *,
    align_block_m: int,
    scales: Scales | None = None,
) -> None:
    """As `sorted_down.launch_down`; rows of expert -1 are always skipped.

    Raises: MoEExtError where TMA, tiles, scales and alignment do not go together, or K is longer.
    """
    arguments = short_arguments(
        a, weights, out, expert_ids, num_tokens_post_padded, config, align_block_m=align_block_m, scales=scales
    )
    blocks_m = expert_ids.numel() * arguments["TILES_PER_BLOCK"]
    tiles_n = -(-weights.shape[1] // config.block_n)
    launch(short_down_kernel, (blocks_m, -(-tiles_n // config.tiles_per_program)), arguments)


def short_arguments(
    a: Tensor,
    weights: Tensor,
    out: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    config: ShortDownConfig,
    *,
    align_block_m: int,
    scales: Scales | None,
) -> dict[str, Any]:
    """Every argument and option of the kernel, by name; no value of a tensor is read, so meta tensors do."""
    _, columns, k = weights.shape
    if k > LONGEST_K:
        raise MoEExtError(f"K={k} does not stay in shared memory: above {LONGEST_K} take sorted_down")
    quantisation = Quantisation() if scales is None else scales.quantisation
    tile = (config.block_m, config.block_n, config.block_k)
    tma.check_tensors(a, weights, out)
    tma.check_tile(tile, k, align_block_m, quantisation, a.device, groups_of_columns=1)
    group_n, group_k = quantisation.block_shape or (0, 0)
    scaling, steps = tma.scaling_of(quantisation), -(-k // config.block_k)
    if steps > 1 and scaling != "block" and tma.capability(a.device) >= tma.BLACKWELL:
        # linkedin/Liger-Kernel issue 1413: two dots into one accumulator are compiled wrongly there (Triton 3.7.1).
        raise MoEExtError(f"block_k={config.block_k} takes {steps} steps along K, which goes wrong on Blackwell")
    a_scale, b_scale = (None, None) if scales is None else (scales.activations, scales.weights)
    return {
        "a_desc": tma.descriptor(a, config.block_m, config.block_k),
        "b_desc": tma.descriptor(weights, 1, config.block_n, config.block_k),
        "c_desc": tma.descriptor(out, config.block_m, config.block_n),
        "a_scale_ptr": a_scale,
        "b_scale_ptr": b_scale,
        "expert_ids_ptr": expert_ids,
        "num_tokens_post_padded_ptr": num_tokens_post_padded,
        "N": columns,
        "tiles_per_program": config.tiles_per_program,
        **tma.scale_strides(a_scale, b_scale),
        "BLOCK_SIZE_M": config.block_m,
        "BLOCK_SIZE_N": config.block_n,
        "BLOCK_SIZE_K": config.block_k,
        "STEPS": steps,
        "TILES_PER_BLOCK": align_block_m // config.block_m,
        "SCALING": scaling,
        "GROUP_N": group_n,
        "GROUP_K": group_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
