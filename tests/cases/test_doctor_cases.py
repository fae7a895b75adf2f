"""Public reports about tables, with the answer that the real SGLang gives: what doctor must say of each.

The tables are made up for sizes of a public report each: vllm#17332 (01), sparkrun's folder of tables (13), tables with
more launch options (15), tables of a bigger GPU on a GB10 (21). What the engine does was asked of SGLang 0.5.23.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.cli import main
from sglang_moe_ext.engines.vllm import installation as vllm
from sglang_moe_ext.gpu import specs
from tests.engines.installed import ENGINES_DIR, REPO_ROOT

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("forked_engines")]

CASES = Path(__file__).parents[1] / "data" / "cases"
VERSION = "0.5.23"
LAYER = "E=256,N=512,K=2048,topk=8,dtype=fp8_w8a8,block_shape=[128,128]"
FOLDERS = {
    "01": CASES / "01-table-with-a-key-that-is-no-number",
    "13": CASES / "13-config-dir-without-configs" / "moe",
    "15": CASES / "15-table-with-other-launch-options",
    "21": CASES / "21-entry-that-the-guard-changes",
}


@pytest.fixture(params=FOLDERS.values(), ids=FOLDERS)
def case(request: pytest.FixtureRequest) -> str:
    return next(name for name, folder in FOLDERS.items() if folder == request.param)


@pytest.fixture
def examined(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Mapping[str, Any]:
    """What doctor says of the layer at M=64, by the real engine with the plugin in it."""
    site = ENGINES_DIR / "sglang" / VERSION
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(REPO_ROOT), str(site))))
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("SGLANG_MOE_CONFIG_DIR", str(FOLDERS[case]))
    monkeypatch.setattr(specs, "detect", lambda: None)
    monkeypatch.setattr(vllm, "find", lambda: None)
    assert main.main(["doctor", "--shape", LAYER, "--gpu", "GB10", "--batch-size", "64", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["examined"]
    return dict(found)


def test_doctor_says_what_runs_and_what_is_wrong(case: str, examined: Mapping[str, Any]) -> None:
    finding, problems = examined["findings"][0], " ".join(examined["problems"])
    match case:
        case "01":
            assert "triton_version is no number of tokens" in problems
            assert "the engine alone raises ValueError: invalid literal for int()" in finding["why"]
            assert finding["config"] == "16x128x128 G8 w4 s2"
        case "13":
            assert "has no folder configs" in problems and "is not read: SGLang looks for it in" in problems
            assert "the engine alone raises FileNotFoundError" in finding["why"]
        case "15":
            assert finding["config"] == "16x128x128 G8 w4 s2"
        case "21":
            assert finding["config"] == "128x256x128 G8 w8 s3"
            assert "num_stages 4 -> 3; the engine alone would end" in finding["why"]
