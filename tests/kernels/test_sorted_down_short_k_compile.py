"""The kernel that keeps A where K is short, compiled for GPUs that need not be here."""

import os
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler, not its interpreter", allow_module_level=True)

from offline_down import check_needs, compiled, operands

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.kernel_plans import ShortKDownConfig
from sglang_moe_ext.kernels import tma
from sglang_moe_ext.kernels.sorted_down_short_k import short_arguments, short_down_kernel

# (sm, kind, K, tile, registers, bytes of shared memory) of Triton 3.7.1, 2026-11-21; Triton 3.6.0 needs the same, but
# for a frame of 8 bytes on sm_120.
NEEDS = [
    (90, "block", 256, ShortKDownConfig(64, 64, 128, 4, 4, 3), 92, 73_784),
    (90, "block", 256, ShortKDownConfig(64, 128, 128, 4, 4, 2), 156, 98_336),
    (90, "block", 256, ShortKDownConfig(128, 64, 128, 4, 8, 3), 91, 98_360),
    (90, "block", 256, ShortKDownConfig(128, 128, 128, 4, 8, 3), 159, 163_896),
    (90, "block", 128, ShortKDownConfig(64, 128, 128, 4, 4, 3), 90, 73_752),
    (90, "block", 512, ShortKDownConfig(64, 64, 128, 4, 4, 2), 156, 106_560),
    (90, "bf16", 256, ShortKDownConfig(128, 64, 128, 4, 8, 3), 58, 180_280),
    (90, "bf16", 256, ShortKDownConfig(64, 64, 128, 4, 4, 3), 58, 139_320),
    (90, "bf16", 128, ShortKDownConfig(64, 128, 128, 4, 4, 3), 90, 131_096),
    (90, "bf16", 512, ShortKDownConfig(64, 64, 128, 4, 4, 2), 60, 204_864),
    (90, "channel", 256, ShortKDownConfig(128, 64, 128, 4, 8, 3), 64, 98_360),
    (90, "tensor", 256, ShortKDownConfig(128, 128, 128, 4, 8, 3), 93, 163_896),
    (100, "block", 256, ShortKDownConfig(128, 64, 128, 4, 8, 3), 80, 98_400),
    (100, "bf16", 128, ShortKDownConfig(128, 64, 128, 4, 8, 3), 45, 98_352),
    (120, "block", 256, ShortKDownConfig(64, 64, 128, 4, 4, 2), 127, 40_984),
    (120, "bf16", 128, ShortKDownConfig(64, 32, 128, 4, 4, 2), 44, 28_680),
]


def arguments(kind: str, k: int, config: ShortKDownConfig) -> dict[str, Any]:
    """Of the down projection of DeepSeek-V3, whose K of 2048 is dealt to 4 ... 16 ranks."""
    tensors, scales = operands(kind, config.block_m, 7168, k, experts=257)
    return short_arguments(*tensors, config, align_block_m=config.block_m, scales=scales)


@pytest.mark.parametrize(("sm", "kind", "k", "config", "registers", "smem_bytes"), NEEDS, ids=str)
def test_a_tile_fits_and_needs_no_more_than_it_did(
    sm: int, kind: str, k: int, config: ShortKDownConfig, registers: int, smem_bytes: int
) -> None:
    check_needs(compiled(sm, short_down_kernel, arguments(kind, k, config)), sm, registers, smem_bytes)


@pytest.mark.parametrize("sm", [90, 100, 120])
def test_the_rows_of_a_are_read_before_the_columns_are_streamed(sm: int) -> None:
    ptx = compiled(sm, short_down_kernel, arguments("block", 256, ShortKDownConfig(64, 64, 128, 4, 4, 2))).asm["ptx"]
    rows = [at for at in range(len(ptx)) if ptx.startswith("cp.async.bulk.tensor.2d.shared", at)]
    loop = max(ptx.rfind(product) for product in ("wgmma.mma_async", "tcgen05.mma", "mma.sync"))
    assert len(rows) == 256 // 128
    assert rows[-1] < loop
    assert "st.global" not in ptx


def test_several_steps_into_one_accumulator_are_refused_on_blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tma, "capability", lambda device: (10, 0))
    arguments("block", 256, ShortKDownConfig(64, 64, 128, 4, 4, 2))
    with pytest.raises(MoEExtError, match="2 steps"):
        arguments("bf16", 256, ShortKDownConfig(64, 64, 128, 4, 4, 2))
