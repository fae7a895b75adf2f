"""The plan command shows what tune would do, and with --worth-it what that could win."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_moe_ext.cli import main
from sglang_moe_ext.gpu import specs
from tests.cases.test_checkpoints import CASES

LAYER = ("--model", "Qwen3-30B-A3B", "--gpu", "H200", "--batch-size", "64", "4096")


@pytest.fixture(autouse=True)
def no_engine_and_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(specs, "detect", lambda: None)
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))


def document(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main.main([*words, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_a_plan_is_the_dry_run_of_tune(capsys: pytest.CaptureFixture[str]) -> None:
    assert document(capsys, "plan", *LAYER) == document(capsys, "tune", *LAYER, "--dry-run")


def test_the_worth_ends_in_plain_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["plan", *LAYER, "--worth-it"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("Tuning wins nothing to count on of prefill at 4,096 tokens") for line in lines[-4:])


def test_the_document_lies_in_the_folder_that_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    printed = document(capsys, "plan", *LAYER, "--worth-it", "--output-dir", str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "plan.json").read_text(encoding="utf-8")) == printed
    assert printed["worth"]["asked"] is False  # type: ignore[index]


def test_a_context_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["plan", *LAYER, "--worth-it", "--context", "0"]) == 1
    assert "error: --context 0: expected a number from 1 to 1000000" in capsys.readouterr().err


def test_a_model_whose_layers_differ_is_planned_layer_by_layer(capsys: pytest.CaptureFixture[str]) -> None:
    model = CASES / "07-layers-of-different-widths"
    words = ("--engine", "sglang", "--model", str(model), "--gpu", "H200", "--batch-size", "64")
    layers = document(capsys, "plan", *words, "--worth-it")["layers"]
    assert len(layers) == 4  # type: ignore[arg-type]
    assert all("worth" in layer for layer in layers)  # type: ignore[attr-defined]
