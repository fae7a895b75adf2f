"""The up projection into the order of the experts, compiled for a GPU that need not be here: no spills, no growth."""

import os
import re
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler, not its interpreter", allow_module_level=True)

from offline_down import KINDS, check_needs, compiled

from sglang_moe_ext.kernel_plans import UpConfig
from sglang_moe_ext.kernels.compiled import resources_of
from sglang_moe_ext.kernels.quantize import Scales
from sglang_moe_ext.kernels.sorted_up import sorted_up_kernel, up_arguments
from sglang_moe_ext.kernels.swiglu import (
    GROUP,
    LONGEST_ROW,
    rows_arguments,
    swiglu_arguments,
    swiglu_kernel,
    swiglu_of_rows_kernel,
)

TOKENS, TOP_K, EXPERTS, K, COLUMNS = 4096, 8, 128, 2048, 768
"""Of Qwen3-30B-A3B."""


def arguments(kind: str, config: UpConfig, quantizes: bool) -> dict[str, Any]:
    dtype, quantization = KINDS[kind]
    stored = dtype if quantization.scheme is None else torch.float8_e4m3fn
    rows = 65536
    columns = COLUMNS if config.is_fused else 2 * COLUMNS
    with torch.device("meta"):
        scales = None
        if quantization.scheme is not None:
            of_weights = torch.empty(EXPERTS, 2 * COLUMNS // GROUP, K // GROUP)
            scales = Scales(quantization, torch.empty(TOKENS, K // GROUP), of_weights)
        return up_arguments(
            torch.empty(TOKENS, K, dtype=stored),
            torch.empty(EXPERTS, 2 * COLUMNS, K, dtype=stored),
            torch.empty(rows, columns, dtype=torch.float8_e4m3fn if quantizes else dtype),
            torch.empty(rows, dtype=torch.int32),
            torch.empty(rows // config.block_m, dtype=torch.int32),
            torch.empty(1, dtype=torch.int32),
            config,
            pairs=TOKENS * TOP_K,
            top_k=TOP_K,
            align_block_m=config.block_m,
            scales=scales,
            out_scale=torch.empty(rows, columns // GROUP) if quantizes else None,
        )


# (sm, kind, tile, quantizes, registers, bytes of shared memory) of Triton 3.7.1, 2026-11-21.
NEEDS = [
    (90, "bf16", UpConfig(128, 256, 64, 8, 8, 4, is_fused=False, half_stores=True), False, 180, 229_408),
    (90, "bf16", UpConfig(128, 128, 64, 8, 8, 4, is_fused=False), False, 118, 163_872),
    (90, "bf16", UpConfig(64, 128, 64, 8, 4, 4, is_fused=False), False, 116, 114_720),
    (90, "bf16", UpConfig(128, 128, 64, 8, 8, 4), False, 255, 229_408),
    (90, "bf16", UpConfig(128, 128, 64, 8, 8, 3), False, 255, 180_248),
    (90, "bf16", UpConfig(64, 128, 64, 8, 4, 4), False, 168, 180_256),
    (90, "bf16", UpConfig(64, 64, 64, 8, 4, 4), False, 128, 106_528),
    (90, "block", UpConfig(64, 128, 128, 8, 4, 3, persistent=False, is_fused=False), False, 160, 73_752),
    (90, "block", UpConfig(64, 128, 128, 8, 8, 2, persistent=False), True, 128, 81_936),
    (90, "block", UpConfig(64, 128, 128, 8, 8, 3), True, 172, 131_608),
    (100, "bf16", UpConfig(128, 256, 64, 8, 8, 4, is_fused=False, half_stores=True), False, 148, 229_424),
    (100, "block", UpConfig(64, 128, 128, 8, 8, 2, persistent=False), True, 157, 81_968),
    (100, "bf16", UpConfig(128, 128, 64, 8, 8, 4), False, 234, 229_424),
    (120, "bf16", UpConfig(64, 64, 64, 8, 4, 3, is_fused=False), False, 106, 40_976),
    (120, "bf16", UpConfig(64, 32, 64, 8, 4, 3), False, 106, 36_880),
    (120, "block", UpConfig(64, 64, 128, 8, 8, 2, is_fused=False), False, 102, 24_584),
]


@pytest.mark.parametrize(("sm", "kind", "config", "quantizes", "registers", "smem_bytes"), NEEDS, ids=str)
def test_a_tile_fits_and_needs_no_more_than_it_did(
    sm: int, kind: str, config: UpConfig, quantizes: bool, registers: int, smem_bytes: int
) -> None:
    check_needs(compiled(sm, sorted_up_kernel, arguments(kind, config, quantizes)), sm, registers, smem_bytes)


def test_the_weights_come_and_the_rows_leave_through_tma() -> None:
    config = UpConfig(128, 256, 64, 8, 8, 4, is_fused=False, half_stores=True)
    ptx = compiled(90, sorted_up_kernel, arguments("bf16", config, False)).asm["ptx"]
    assert ".global.mbarrier::complete_tx::bytes" in ptx
    assert ".global.shared::cta.bulk_group" in ptx
    assert "st.global" not in ptx


def test_gate_and_up_are_one_product_of_what_tma_brought() -> None:
    ptx = compiled(90, sorted_up_kernel, arguments("bf16", UpConfig(128, 128, 64, 8, 8, 4), False)).asm["ptx"]
    assert set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(\w+)", ptx)) == {"m64n256k16"}
    assert "st.shared" not in ptx


def test_a_row_of_the_longest_is_held_without_spills() -> None:
    with torch.device("meta"):
        tensors = torch.empty(4096, 2 * LONGEST_ROW, dtype=torch.bfloat16), torch.empty(1, dtype=torch.int32)
        out, scales = torch.empty(4096, LONGEST_ROW, dtype=torch.float8_e4m3fn), torch.empty(4096, 1)
    needs = resources_of(compiled(90, swiglu_of_rows_kernel, rows_arguments(*tensors, out, scales)))
    assert needs.spill_bytes == 0


def test_the_activation_loads_and_stores_whole_vectors() -> None:
    with torch.device("meta"):
        tensors = torch.empty(4096, 1536, dtype=torch.bfloat16), torch.empty(1, dtype=torch.int32)
        out, scales = torch.empty(4096, 768, dtype=torch.float8_e4m3fn), torch.empty(4096, 6)
    kernel = compiled(90, swiglu_kernel, swiglu_arguments(*tensors, out, scales))
    assert ".v2.b32" in kernel.asm["ptx"] or ".v4.b32" in kernel.asm["ptx"]
