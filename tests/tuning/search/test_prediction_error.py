"""The margin that a predicted gain must exceed is the error that was measured, and lets no harmful entry through."""

from __future__ import annotations

import re

import pytest

from sglang_moe_ext.core import MoEShape, TileConfig
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.search import predict
from sglang_moe_ext.tuning.search.prediction_error import CHECKED, CheckedGain, margin
from tests.engines.installed import REPO_ROOT

GLM_ON_H200 = Problem(MoEShape(65, 1536, 2048, 5, fused_shared=1), specs.find("H200"), "sglang")
ROW = re.compile(
    r"\| (\d+) \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \| [\d.]+x \| \+[\d.]+% \| \d+% \| (\S+) G1 w(\d) s(\d) \| "
)


def documented() -> dict[int, tuple[float, TileConfig]]:
    """By M, the measured gain of the predicted table, and its entry."""
    text = next(
        text
        for path in sorted((REPO_ROOT / "docs").rglob("*.md"))
        if "A predicted table against a measured one" in (text := path.read_text())
    )
    return {
        int(m): (float(today) / float(predicted), TileConfig(*map(int, tile.split("x")), 1, int(warps), int(stages)))
        for m, today, predicted, tile, warps, stages in ROW.findall(text)
    }


def default(tokens: int) -> TileConfig:
    """SGLang's own for bf16: fused_moe_triton_config.get_default_config; warps and stages are Triton's."""
    return TileConfig(16, 32, 64, 1, 4, 3) if tokens <= GLM_ON_H200.shape.experts else TileConfig(64, 64, 32, 8, 4, 3)


@pytest.mark.parametrize("checked", CHECKED, ids=lambda checked: f"M={checked.tokens}")
def test_the_checked_gains_are_those_of_the_model_and_of_the_document(checked: CheckedGain) -> None:
    measured, entry = documented()[checked.tokens]
    assert checked.measured == pytest.approx(measured, abs=6e-4)
    assert checked.predicted == pytest.approx(
        predict.gain_over(default(checked.tokens), entry, GLM_ON_H200, checked.tokens), abs=6e-4
    )


def test_no_entry_that_was_measured_slower_than_the_default_passes_the_margin() -> None:
    passing = [checked for checked in CHECKED if checked.predicted > margin(checked.tokens)]
    assert {checked.tokens for checked in passing} == {1, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 8192, 16384}
    assert all(checked.measured > 1 for checked in passing)
