"""The kernel over sorted rows, compiled for GPUs that need not be here: no spills, and no more than was found once."""

import os
import re
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler, not its interpreter", allow_module_level=True)

from offline_down import check_needs, compiled, operands

from sglang_moe_ext.kernel_plans import DownConfig
from sglang_moe_ext.kernels import tma
from sglang_moe_ext.kernels.sorted_down import kernel_arguments, sorted_down_kernel

# (sm, kind, tile, registers, bytes of shared memory) of Triton 3.7.1, 2026-11-21. Triton 3.6.0 needs the same memory,
# up to 51 registers more, and on sm_120 a frame of 8 bytes.
NEEDS = [
    (90, "bf16", DownConfig(128, 256, 64, 8, 8, 3), 164, 213_016),
    (90, "bf16", DownConfig(128, 256, 64, 8, 8, 3, half_stores=True), 164, 180_248),
    (90, "bf16", DownConfig(128, 256, 64, 8, 8, 4, half_stores=True), 166, 229_408),
    (90, "bf16", DownConfig(128, 256, 64, 8, 8, 4, persistent=False), 154, 196_640),
    (90, "bf16", DownConfig(128, 128, 64, 8, 8, 4), 100, 163_872),
    (90, "bf16", DownConfig(128, 128, 64, 8, 4, 4), 161, 163_872),
    (90, "bf16", DownConfig(128, 128, 64, 8, 4, 3, persistent=False), 154, 98_328),
    (90, "bf16", DownConfig(64, 128, 64, 8, 4, 4), 93, 114_720),
    (90, "bf16", DownConfig(64, 128, 64, 8, 4, 3), 92, 90_136),
    (90, "bf16", DownConfig(64, 256, 64, 8, 8, 4, half_stores=True), 112, 213_024),
    (90, "bf16", DownConfig(64, 256, 64, 8, 4, 4, half_stores=True), 161, 180_256),
    (90, "bf16", DownConfig(16, 128, 128, 8, 4, 3), 62, 77_840),
    (90, "fp16", DownConfig(128, 256, 64, 8, 8, 4, half_stores=True), 166, 229_408),
    (90, "block", DownConfig(64, 128, 128, 8, 4, 3), 165, 90_136),
    (90, "block", DownConfig(64, 128, 128, 8, 4, 3, persistent=False), 152, 73_752),
    (90, "block", DownConfig(64, 128, 128, 8, 4, 2), 164, 65_552),
    (90, "block", DownConfig(64, 256, 128, 8, 8, 3), 164, 139_288),
    (90, "block", DownConfig(128, 128, 128, 8, 8, 3), 166, 131_096),
    (90, "block", DownConfig(128, 128, 128, 8, 8, 4, half_stores=True), 177, 147_488),
    (90, "block", DownConfig(16, 128, 128, 8, 4, 3), 120, 40_992),
    (90, "channel", DownConfig(128, 256, 128, 8, 8, 3, half_stores=True), 174, 180_248),
    (90, "channel", DownConfig(128, 128, 128, 8, 8, 3), 128, 131_096),
    (90, "channel", DownConfig(64, 128, 128, 8, 4, 3), 120, 90_648),
    (90, "tensor", DownConfig(128, 256, 128, 8, 8, 3, half_stores=True), 164, 180_248),
    (90, "tensor", DownConfig(128, 128, 128, 8, 8, 4, half_stores=True), 105, 147_488),
    (100, "bf16", DownConfig(128, 256, 64, 8, 8, 4, half_stores=True), 122, 229_424),
    (100, "bf16", DownConfig(128, 128, 64, 8, 8, 4), 87, 163_888),
    (100, "bf16", DownConfig(64, 128, 64, 8, 4, 4), 77, 114_736),
    (100, "block", DownConfig(64, 128, 128, 8, 4, 3), 158, 90_160),
    (100, "block", DownConfig(128, 128, 128, 8, 8, 3), 162, 131_120),
    (100, "channel", DownConfig(128, 256, 128, 8, 8, 3, half_stores=True), 140, 180_272),
    (100, "tensor", DownConfig(128, 256, 128, 8, 8, 3, half_stores=True), 114, 180_272),
    (120, "bf16", DownConfig(128, 128, 64, 8, 8, 3, half_stores=True), 128, 81_936),
    (120, "bf16", DownConfig(128, 128, 64, 8, 8, 3, persistent=False), 121, 65_552),
    (120, "bf16", DownConfig(64, 128, 64, 8, 4, 3), 127, 65_552),
    (120, "bf16", DownConfig(64, 64, 64, 8, 4, 4), 76, 57_368),
    (120, "block", DownConfig(64, 128, 128, 8, 8, 3), 128, 65_552),
    (120, "block", DownConfig(64, 64, 128, 8, 4, 3), 128, 40_976),
    (120, "channel", DownConfig(128, 128, 64, 8, 8, 3), 129, 65_552),
    (120, "tensor", DownConfig(128, 128, 64, 8, 8, 3), 98, 65_552),
]
SYNCHRONOUS = "wgmma.wait_group.sync.aligned 0"
LOAD, STORE = ".global.mbarrier::complete_tx::bytes", ".global.shared::cta.bulk_group"


def arguments(kind: str, config: DownConfig, *, elsewhere: bool = False, **sizes: int) -> dict[str, Any]:
    """Of the down projection of Qwen3-30B-A3B."""
    tensors, scales = operands(kind, config.block_m, 2048, 768, **sizes)
    where = {"align_block_m": config.block_m, "experts_elsewhere": elsewhere}
    return kernel_arguments(*tensors, config, scales=scales, **where)


def down_kernel(sm: int, kind: str, config: DownConfig, **where: Any) -> Any:
    return compiled(sm, sorted_down_kernel, arguments(kind, config, **where))


@pytest.mark.parametrize(("sm", "kind", "config", "registers", "smem_bytes"), NEEDS, ids=str)
def test_a_tile_fits_and_needs_no_more_than_it_did(
    sm: int, kind: str, config: DownConfig, registers: int, smem_bytes: int
) -> None:
    check_needs(down_kernel(sm, kind, config), sm, registers, smem_bytes)


TMA_ONLY = [(90, "bf16", True), (90, "bf16", False), (90, "block", True), (100, "bf16", True), (120, "bf16", True)]


@pytest.mark.parametrize(("sm", "kind", "persistent"), TMA_ONLY)
def test_tiles_come_and_go_through_tma_alone(sm: int, kind: str, persistent: bool) -> None:
    ptx = down_kernel(sm, kind, DownConfig(64, 128, 64, 8, 4, 3, persistent)).asm["ptx"]
    assert ptx.count(LOAD) >= 4
    assert ptx.count(STORE) >= 1
    assert "st.global" not in ptx
    assert "cp.async.cg" not in ptx


@pytest.mark.parametrize("persistent", [True, False], ids=["crew", "one-tile"])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "channel", "tensor"])
def test_the_next_products_start_before_the_last_ones_end(kind: str, persistent: bool) -> None:
    ptx = down_kernel(90, kind, DownConfig(128, 128, 64, 8, 8, 4, persistent)).asm["ptx"]
    after_products = ptx[ptx.index("wgmma.mma_async") :]
    waits = re.findall(r"wgmma.wait_group.sync.aligned \d", after_products)
    assert waits[0] != SYNCHRONOUS


def test_a_store_is_awaited_where_the_next_one_begins() -> None:
    ptx = down_kernel(90, "bf16", DownConfig(128, 128, 64, 8, 8, 4)).asm["ptx"]
    assert ptx.index("cp.async.bulk.wait_group") < ptx.index(STORE)


@pytest.mark.parametrize("kind", ["bf16", "block"])
def test_one_binary_serves_every_batch_and_every_number_of_experts(kind: str) -> None:
    config = DownConfig(64, 128, 128, 8, 4, 2)
    few = down_kernel(90, kind, config, rows=64, experts=8)
    many = down_kernel(90, kind, DownConfig(64, 128, 128, 64, 4, 2, programs_per_sm=3), rows=65536, experts=257)
    assert few.asm["ptx"] == many.asm["ptx"]


def test_looking_for_experts_of_this_rank_costs_nothing_where_all_are_here() -> None:
    config = DownConfig(128, 256, 64, 8, 8, 4, half_stores=True)
    ptx = down_kernel(90, "bf16", config).asm["ptx"]
    assert len(ptx) < len(down_kernel(90, "bf16", config, elsewhere=True).asm["ptx"])


def test_a_descriptor_of_weights_is_made_once_and_keeps_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[tuple[Any, ...], Any] = {}
    monkeypatch.setattr(tma, "_kept", kept)
    config = DownConfig(64, 128, 64, 8, 4, 3)
    first, again = (arguments("bf16", config)["b_desc"] for _ in range(2))
    other = arguments("bf16", DownConfig(64, 64, 64, 8, 4, 3))["b_desc"]
    assert first is again
    assert other is not first
    assert not any(isinstance(descriptor.base, torch.Tensor) for descriptor in kept.values())


def test_the_descriptors_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[tuple[Any, ...], Any] = {}
    monkeypatch.setattr(tma, "_kept", kept)
    monkeypatch.setattr(tma, "DESCRIPTORS_KEPT", 3)
    for experts in range(1, 9):
        arguments("bf16", DownConfig(64, 128, 64, 8, 4, 3), experts=experts)
    assert 0 < len(kept) <= 3
