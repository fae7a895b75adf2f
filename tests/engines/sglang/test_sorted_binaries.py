"""The compile pool makes every binary that a layer of our own kernels launches."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.core import MoEShape, Quantization, TileConfig
from sglang_moe_ext.few_tokens_config import DownTile, FewTokensConfig, UpTile
from sglang_moe_ext.kernel_plans import (
    DownConfig,
    KernelPlan,
    ShortKDownConfig,
    UpConfig,
    WarpSpecializedDown,
    WarpSpecializedUp,
)
from sglang_moe_ext.tables import plan_table
from tests.engines.installed import run_in_engine

pytestmark = pytest.mark.usefixtures("forked_engines")

CHILD = Path(__file__).parents[1] / "children" / "sorted_binaries.py"
VERSIONS = ("0.5.12", "0.5.23")
BF16 = MoEShape(64, 1536, 2048, 4)
BLOCK = MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", (128, 128)))
SHORT = MoEShape(256, 256, 7168, 8, Quantization("fp8_w8a8", (128, 128)))
CHANNEL = MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", per_channel=True))
DOWN_16 = DownConfig(64, 128, 64, 8, 4, 4, True, 2)
DOWN_8 = DownConfig(64, 128, 128, 8, 4, 4, True, 2)
CASES = {
    "16 bits, fused up": (BF16, KernelPlan(UpConfig(64, 128, 64, 8, 4, 4), DOWN_16), 4096),
    "16 bits, up as it lies": (BF16, KernelPlan(UpConfig(128, 256, 64, 8, 8, 4, True, 1, False, True), DOWN_16), 16384),
    "16 bits, the engine's up": (BF16, KernelPlan(TileConfig(64, 128, 64, 8, 4, 4), DOWN_16), 1024),
    "block, fused up": (BLOCK, KernelPlan(UpConfig(64, 128, 128, 8, 8, 3), DOWN_8), 4096),
    "block, up as it lies": (BLOCK, KernelPlan(UpConfig(64, 128, 128, 8, 4, 3, False, 1, False), DOWN_8), 1024),
    "block, short K": (
        SHORT,
        KernelPlan(TileConfig(64, 128, 128, 8, 4, 3), ShortKDownConfig(64, 64, 128, 28, 4, 3)),
        4096,
    ),
    "16 bits, warp-specialized": (BF16, KernelPlan(WarpSpecializedUp(2), WarpSpecializedDown("wide", 4)), 4096),
    "16 bits, warp-specialized up alone": (BF16, KernelPlan(WarpSpecializedUp(1, persistent=False), DOWN_16), 4096),
    "block, warp-specialized": (BLOCK, KernelPlan(WarpSpecializedUp(2), WarpSpecializedDown("pair", 8, 3)), 4096),
    "block, warp-specialized up alone": (BLOCK, KernelPlan(WarpSpecializedUp(2), DOWN_8), 4096),
    "block, warp-specialized down alone": (
        BLOCK,
        KernelPlan(UpConfig(128, 128, 128, 8, 8, 3, True, 1, False), WarpSpecializedDown("wide", 4)),
        4096,
    ),
    "channel, warp-specialized": (CHANNEL, KernelPlan(WarpSpecializedUp(2), WarpSpecializedDown("wide", 8)), 4096),
    "channel, the engine's up": (CHANNEL, KernelPlan(TileConfig(64, 128, 128, 8, 4, 3), DOWN_8), 4096),
}

CASES |= {f"{name}, odd": (shape, plan, 1021) for name, (shape, plan, _) in CASES.items() if plan.is_warp_specialized}
FEW = {
    "16 bits": (BF16, FewTokensConfig(UpTile(1, 16, 256, 4, 3), DownTile(1, 16, 256, 4, 4)), (1, 7, 16)),
    "grouped": (
        BF16,
        FewTokensConfig(UpTile(16, 32, 128, 4, 4), DownTile(16, 64, 128, 4, 4, split=8), grouped=True),
        (1, 7, 15),
    ),
    "block": (
        BLOCK,
        FewTokensConfig(UpTile(8, 16, 128, 2, 5), DownTile(8, 64, 128, 4, 4, split=8), wide_range=True),
        (1, 7, 16),
    ),
}


@functools.cache
def binaries(version: str) -> dict[str, Any]:
    """Of each case in that version, all from one process."""
    asked = [
        {"shape": str(shape), "plan": plan_table.document_of(plan), "tokens": tokens}
        for shape, plan, tokens in (*CASES.values(), *((*it[:2], m) for it in FEW.values() for m in it[2]))
    ]
    names = [*CASES, *(f"few tokens, {name}, {m}" for name, it in FEW.items() for m in it[2])]
    return dict(zip(names, run_in_engine(version, CHILD, asked), strict=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_layer_launches_the_binaries_that_the_pool_made(version: str, case: str) -> None:
    found = binaries(version)[case]
    assert len(found["launched"]) >= 4
    assert set(found["launched"]) == set(found["made"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", VERSIONS)
def test_each_half_states_what_its_largest_kernel_needs(version: str, case: str) -> None:
    for smem_bytes, registers, spill_bytes in binaries(version)[case]["needs"]:
        assert 32 * 1024 < smem_bytes <= 232_448
        assert 64 < registers <= 255
        assert spill_bytes == 0


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", [case for case in CASES if "specialized" in case and ", odd" not in case])
def test_a_warp_specialized_plan_has_the_same_binaries_for_every_number_of_tokens(version: str, case: str) -> None:
    """So that no request waits for a compiler because its number of tokens has other divisors."""
    assert binaries(version)[case]["launched"] == binaries(version)[f"{case}, odd"]["launched"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", FEW)
def test_a_plan_for_few_tokens_launches_two_binaries_the_same_for_every_number_of_tokens(
    version: str, case: str
) -> None:
    """Which is why a server loads it by one batch of one token; grouped, by one of more pairs than experts too."""
    found = [binaries(version)[f"few tokens, {case}, {m}"] for m in FEW[case][2]]
    assert all(len(of["launched"]) == 2 and of["launched"] == of["made"] for of in found)
    assert all(of["launched"] == found[0]["launched"] for of in found)
