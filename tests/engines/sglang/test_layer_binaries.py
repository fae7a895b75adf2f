"""What the whole layer launches is what the compile pool made for it: else each comparison would compile again."""

from __future__ import annotations

import functools
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.core import CompileJob, CompileKey, MoEShape, Quantization, Target, TileConfig
from tests.engines.installed import ENGINE_VERSIONS, run_in_engine

pytestmark = pytest.mark.usefixtures("forked_engines")

CHILD = Path(__file__).parents[1] / "children" / "layer_binaries.py"
BF16 = MoEShape(65, 1536, 2048, 5, fused_shared=1)
FP8_BLOCK = MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", (128, 128)))
PLAIN, OTHER = TileConfig(64, 128, 64, 16, 4, 3), TileConfig(64, 64, 64, 1, 4, 4)
TMA = TileConfig(64, 64, 64, 1, 4, 4, use_tma=True)
UP_TMA = TileConfig(64, 128, 64, 16, 4, 3, use_tma=True)
VERSIONS_WITH_UP_TMA = ("0.5.18", "0.5.20", "0.5.23")
CASES = {
    f"{name}{', down by TMA' if down.use_tma else ''}, M={tokens}": (shape, (PLAIN, down), tokens)
    for name, shape in (("bf16", BF16), ("fp8 block", FP8_BLOCK))
    for down in (OTHER, TMA)
    for tokens in (1, 24, 1024)
}


CASES_OF_UP_TMA = {
    f"up by TMA, {'down too, ' if down.use_tma else ''}M={tokens}": (BF16, (UP_TMA, down), tokens)
    for down in (OTHER, TMA)
    for tokens in (1, 1024)
}


@functools.cache
def binaries(version: str) -> dict[str, Any]:
    """Of each case in that version, all from one process. Hashes are settled before anything is assembled."""
    cases = CASES | (CASES_OF_UP_TMA if version in VERSIONS_WITH_UP_TMA else {})
    asked: list[dict[str, Any]] = [
        {
            "job": asdict(CompileJob(shape, "up", tokens, CompileKey(64, 128, 64, 4, 3), Target(90))),
            "pair": [astuple(config) for config in pair],
            "tokens": tokens,
        }
        for shape, pair, tokens in cases.values()
    ]
    front_end = version != ENGINE_VERSIONS[-1]
    return dict(zip(cases, run_in_engine(version, CHILD, {"cases": asked, "front_end": front_end}), strict=True))


@pytest.mark.parametrize(
    ("version", "case"),
    [
        *((version, case) for version in ENGINE_VERSIONS for case in CASES),
        *((version, case) for version in VERSIONS_WITH_UP_TMA for case in CASES_OF_UP_TMA),
    ],
)
def test_the_layer_launches_the_binaries_that_the_farm_made(version: str, case: str) -> None:
    found = binaries(version)[case]
    assert len(found["launched"]) == 2
    assert found["launched"] == found["made"]
