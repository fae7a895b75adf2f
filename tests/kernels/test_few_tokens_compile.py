"""The two launches for few tokens, compiled for GPUs that need not be here."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler, not its interpreter", allow_module_level=True)

from offline_down import compiled

from sglang_moe_ext.core import Quantization
from sglang_moe_ext.few_tokens_config import DownTile, FewTokensConfig, UpTile
from sglang_moe_ext.kernels.compiled import resources_of
from sglang_moe_ext.kernels.few_tokens import ExpertWeights, Routed, down_arguments, up_arguments, workspace
from sglang_moe_ext.kernels.few_tokens_kernel import down_kernel, up_kernel

EXPERTS, HIDDEN, INNER, TOP_K = 128, 2048, 768, 8
SCHEMES = {
    "bf16": (torch.bfloat16, Quantization()),
    "fp8-block": (torch.float8_e4m3fn, Quantization("fp8_w8a8", (128, 128))),
    "fp8-channel": (torch.float8_e4m3fn, Quantization("fp8_w8a8", per_channel=True)),
    "int8-group": (torch.uint8, Quantization("int8_w8a16", (0, 128))),
    "int4-group": (torch.uint8, Quantization("int4_w4a16", (0, 128))),
}
VECTOR = FewTokensConfig(UpTile(1, 16, 128, 4, 4), DownTile(1, 16, 128, 4, 4, split=2, prefetched=1))
MATRIX = FewTokensConfig(UpTile(8, 32, 128, 4, 4), DownTile(8, 64, 128, 4, 4, split=4, prefetched=1))
GROUPED = FewTokensConfig(UpTile(16, 32, 128, 4, 3), DownTile(16, 64, 128, 4, 3, split=8), grouped=True)
WIDE = FewTokensConfig(UpTile(32, 32, 128, 4, 3), DownTile(32, 64, 128, 4, 3, split=8), grouped=True)
PATHS = {"vector": (VECTOR, 1), "matrix": (MATRIX, 4), "grouped": (GROUPED, 16), "wide": (WIDE, 32)}
SMEM_PER_BLOCK = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
MOST_REGISTERS = 168
"""Three programs of 128 threads a multiprocessor."""


def kernels(sm: int, scheme: str, config: FewTokensConfig, tokens: int) -> tuple[Any, Any]:
    """`up` and `down`, of Qwen3-30B-A3B."""
    dtype, quantization = SCHEMES[scheme]
    packed = 2 if quantization.weight_bits == 4 else 1

    def weights(rows: int, k: int) -> ExpertWeights:
        values = torch.empty(EXPERTS, rows, k // packed, dtype=dtype)
        if quantization.scheme is None:
            return ExpertWeights(values)
        n, d = quantization.block_shape or (1, k)
        scale_dtype = torch.bfloat16 if packed == 2 or n == 0 else torch.float32
        return ExpertWeights(values, torch.empty(EXPERTS, rows // max(n, 1), k // d, dtype=scale_dtype), quantization)

    with torch.device("meta"):
        hidden = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16)
        w1, w2 = weights(2 * INNER, HIDDEN), weights(HIDDEN, INNER)
        routed = Routed(torch.empty(tokens, TOP_K, dtype=torch.int32), torch.empty(tokens, TOP_K))
        between = workspace(hidden, w1.values, routed.ids, config)
    up = compiled(sm, up_kernel, up_arguments(hidden, w1, routed, between, config, sm=sm))
    return up, compiled(sm, down_kernel, down_arguments(between, w2, routed, hidden, config, sm=sm))


COMPILED = [
    (sm, scheme, path)
    for sm in SMEM_PER_BLOCK
    for scheme in SCHEMES
    for path in PATHS
    if sm in (86, 90) or (scheme in ("bf16", "fp8-block") and sm != 80)
]
"""All on the two that differ most: `mma` with little shared memory, `wgmma` with much. 80 has the code of 86, and more
shared memory; on the others, the two schemes that most models have."""


@pytest.mark.parametrize(("sm", "scheme", "path"), COMPILED)
def test_both_launches_fit_and_do_not_spill(sm: int, scheme: str, path: str) -> None:
    for kernel in kernels(sm, scheme, *PATHS[path]):
        needs = resources_of(kernel)
        assert needs.spill_bytes == 0
        assert needs.registers <= MOST_REGISTERS
        assert needs.smem_bytes <= SMEM_PER_BLOCK[sm]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scheme", ["bf16", "fp8-block"])
def test_all_stages_of_the_weights_are_under_way_at_once(scheme: str, path: str) -> None:
    """Where the compiler copies ahead what leads to the weights, it halves the stages of the weights themselves."""
    config, tokens = PATHS[path]
    rows = {"up": 2 * config.up.columns, "down": config.down.columns}
    for name, kernel, tile in zip(rows, kernels(90, scheme, config, tokens), (config.up, config.down), strict=True):
        stage_bytes = rows[name] * tile.block_k * SCHEMES[scheme][0].itemsize
        assert resources_of(kernel).smem_bytes >= (tile.num_stages - 1) * stage_bytes


@pytest.mark.parametrize(("sm", "has_it"), [(80, False), (89, False), (90, True), (100, True), (120, True)])
def test_down_waits_for_up_where_the_gpu_has_dependent_launch(sm: int, has_it: bool) -> None:
    up, down = kernels(sm, "bf16", MATRIX, 4)
    assert ("griddepcontrol.launch_dependents" in up.asm["ptx"]) == has_it
    assert ("griddepcontrol.wait" in down.asm["ptx"]) == has_it
    ptx = down.asm["ptx"]
    if has_it:
        assert ptx.rfind("prefetch.global.L2") < ptx.find("griddepcontrol.wait")
        assert down.metadata.launch_pdl


@pytest.mark.parametrize("wide_range", [False, True])
def test_float8_never_goes_through_the_slow_conversion(wide_range: bool) -> None:
    config = FewTokensConfig(MATRIX.up, MATRIX.down, wide_range=wide_range)
    for kernel in kernels(90, "fp8-block", config, 4):
        assert not re.search(r"cvt\.rn\.bf16\.f16", kernel.asm["ptx"])


def test_float8_is_read_16_bytes_at_a_time() -> None:
    for kernel in kernels(90, "fp8-block", MATRIX, 4):
        assert "cp.async.cg.shared.global" in kernel.asm["ptx"]
