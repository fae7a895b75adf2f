"""A model whose MoE layers differ: `tune` does each of its tables in one run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.cli import main
from sglang_moe_ext.core import EngineError
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.tuning import pipeline
from sglang_moe_ext.tuning.request import Progress, TuneRequest
from tests.cases.test_checkpoints import CASES

CASE = CASES / "07-layers-of-different-widths"
WIDTHS = {2688: 22, 1280: 4, 1792: 8, 2048: 18}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(specs, "detect", lambda: None)


def tune(capsys: pytest.CaptureFixture[str], *flags: str, status: int = 0) -> tuple[Mapping[str, Any], str]:
    assert main.main(["tune", "--gpu", "H200", "--batch-size", "64", "--json", *flags]) == status
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_each_table_is_planned_once_as_a_rank_has_it(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--engine", engine, "--model", str(CASE), "--tp-size", "2", "--dry-run")
    document, said = tune(capsys, *flags)
    expected = {
        f"E=512,N={width // 2},K=1024,topk={top_k},dtype=bfloat16,gated=False" for width, top_k in WIDTHS.items()
    }
    shapes = [layer["shape"] for layer in document["layers"]]
    assert (set(shapes), len(shapes)) == (expected, 4)
    assert "4 of 4 layers done" in said


def test_layers_that_read_one_table_are_tuned_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((CASE / "config.json").read_text())
    for block in config["block_configs"]:
        if block.get("moe_intermediate_size") == 1792:
            block["moe_intermediate_size"] = 1280
    (tmp_path / "config.json").write_text(json.dumps(config))
    document, said = tune(capsys, "--model", str(tmp_path), "--dry-run")
    assert len(document["layers"]) == 3
    (note,) = (line for line in said.splitlines() if "reads the same table" in line)
    assert "N=1280" in note


def test_a_layer_that_fails_costs_itself_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[int] = []

    def run(request: TuneRequest, progress: Progress) -> Any:
        tried.append(request.shape.intermediate_size)
        raise EngineError("a measured table for this layer is stored")

    monkeypatch.setattr(pipeline, "run", run)
    document, said = tune(capsys, "--model", str(CASE), status=1)
    assert sorted(tried) == sorted(WIDTHS)
    assert all(layer["error"] == "a measured table for this layer is stored" for layer in document["layers"])
    assert "0 of 4 layers done" in said


def test_a_line_of_a_log_is_about_one_layer(capsys: pytest.CaptureFixture[str]) -> None:
    line = "Config file not found at E=512,N=1280,device_name=NVIDIA_H200.json"
    document, _ = tune(capsys, "--model", str(CASE), "--from-log", line, status=1)
    assert "its MoE layers differ" in document["error"]
