"""Grouped down GEMM for K <= 512, as tensor parallelism leaves it: A stays in registers, B is streamed.

Reference: `reference.down`. Launches allocate no memory and do not synchronize, so a CUDA graph can capture them.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sglang_moe_ext.core import MoEExtError, Quantization
from sglang_moe_ext.kernel_plans import LONGEST_K, ShortKDownConfig
from sglang_moe_ext.kernels import tma
from sglang_moe_ext.kernels.launcher import launch
from sglang_moe_ext.kernels.quantize import Scales
from sglang_moe_ext.kernels.sorted_down import scaled


@triton.jit(do_not_specialize=("tiles_per_program",))  # type: ignore[untyped-decorator]
def short_down_kernel(  # type: ignore[no-untyped-def]
    a_desc,
    b_desc,
    c_desc,
    a_scale_ptr,
    b_scale_ptr,
    expert_ids_ptr,
    num_tokens_post_padded_ptr,
    N,
    tiles_per_program,
    stride_asm,
    stride_ask,
    stride_bse,
    stride_bsn,
    stride_bsk,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    STEPS: tl.constexpr,
    TILES_PER_BLOCK: tl.constexpr,
    SCALING: tl.constexpr,
    GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_SIZE_M
    if row >= tl.load(num_tokens_post_padded_ptr):
        return
    expert = tl.load(expert_ids_ptr + tl.program_id(0) // TILES_PER_BLOCK)
    if expert < 0:
        return
    if SCALING != "none":
        b_scale_ptr += expert.to(tl.int64) * stride_bse
    a_scale_ptrs = a_scale_ptr
    if SCALING == "block":
        a_scale_ptrs += (row + tl.arange(0, BLOCK_SIZE_M)).to(tl.int64) * stride_asm
    a = ()
    a_scale = ()
    for step in tl.static_range(STEPS):
        a += (a_desc.load([row, step * BLOCK_SIZE_K]),)  # type: ignore[assignment]
        if SCALING == "block":
            a_scale += (tl.load(a_scale_ptrs + step * BLOCK_SIZE_K // GROUP_K * stride_ask),)  # type: ignore[assignment]

    first = tl.program_id(1) * tiles_per_program
    last = min(first + tiles_per_program, tl.cdiv(N, BLOCK_SIZE_N))
    for tile in tl.range(first, last):
        column = tile * BLOCK_SIZE_N
        acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), tl.float32)
        for step in tl.static_range(STEPS):
            b = b_desc.load([expert, column, step * BLOCK_SIZE_K]).reshape(BLOCK_SIZE_N, BLOCK_SIZE_K)
            if SCALING == "block":
                at = column // GROUP_N * stride_bsn + step * BLOCK_SIZE_K // GROUP_K * stride_bsk
                acc += tl.dot(a[step], b.T) * (a_scale[step] * tl.load(b_scale_ptr + at))[:, None]
            else:
                acc = tl.dot(a[step], b.T, acc)
        acc = scaled(acc, a_scale_ptr, b_scale_ptr, row, column, N, stride_asm, stride_bsn, SCALING)
        c_desc.store([row, column], acc.to(c_desc.dtype))


def launch_short_down(
    a: Tensor,
    weights: Tensor,
    out: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    config: ShortKDownConfig,
    *,
    align_block_m: int,
    scales: Scales | None = None,
) -> None:
    """As `sorted_down.launch_down`; rows of expert -1 are always skipped.

    Raises:
        MoEExtError: TMA, tile, scales and alignment do not fit together, or K is longer than 512.
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
    config: ShortKDownConfig,
    *,
    align_block_m: int,
    scales: Scales | None,
) -> dict[str, Any]:
    """Every argument and option of the kernel by name. Reads no tensor values: meta tensors work."""
    _, columns, k = weights.shape
    if k > LONGEST_K:
        raise MoEExtError(f"K={k} does not stay in shared memory: above {LONGEST_K} take sorted_down")
    quantization = Quantization() if scales is None else scales.quantization
    tile = (config.block_m, config.block_n, config.block_k)
    tma.check_tensors(a, weights, out)
    tma.check_tile(tile, k, align_block_m, quantization, a.device, groups_of_columns=1)
    group_n, group_k = quantization.block_shape or (0, 0)
    scaling, steps = tma.scaling_of(quantization), -(-k // config.block_k)
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
