"""`sglang-moe-ext doctor` where vLLM is installed: the real one answers, of a GPU that is not here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.cli import main
from sglang_moe_ext.core import MoEShape, TileConfig
from sglang_moe_ext.engines.lookup_probe import LookupRequest, LookupResult, ProbeModule
from sglang_moe_ext.engines.sglang import installation as sglang
from sglang_moe_ext.gpu import specs
from tests.engines.installed import ENGINES_DIR, vllm_environment

pytestmark = pytest.mark.usefixtures("forked_engines")

VERSION = "0.33.0"
ASKED = ("doctor", "--json", "--gpu", "H200", "--batch-size", "1", "64")


@pytest.fixture(autouse=True)
def vllm_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real vLLM, no SGLang, and nothing of this machine's store and GPU."""
    for name, value in vllm_environment(VERSION).items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(ENGINES_DIR / "vllm" / VERSION))
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(sglang, "find", lambda: None)
    monkeypatch.setattr(specs, "detect", lambda: None)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[LookupRequest]:
    """Each question that would start an engine; the answer is always the same."""
    questions: list[LookupRequest] = []

    def ask(_: ProbeModule, question: LookupRequest) -> LookupResult:
        questions.append(question)
        taken = dict.fromkeys(question.tokens, TileConfig(16, 32, 64, 1, 4, 3))
        return LookupResult(VERSION, "3.7.1", "NVIDIA H200", taken, dict.fromkeys(taken), (), (), plugin="active")

    monkeypatch.setattr(ProbeModule, "ask", ask)
    return questions


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


def test_the_table_that_vllm_takes_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main((*ASKED, "--model", "Qwen3-30B-A3B")) == 0
    (examined,) = document(capsys)["examined"]
    assert (examined["engine"], examined["plugin"]) == ("vLLM", "active")
    assert [Path(file).name for file in examined["files"]] == ["E=128,N=768,device_name=NVIDIA_H200.json"]
    assert {it["why"].partition(";")[0] for it in examined["findings"]} == {"its own entry"}


def test_a_models_layer_is_that_of_vllm_which_fuses_no_shared_expert(asked: list[LookupRequest]) -> None:
    assert main.main((*ASKED, "--model", "GLM-4.7-Flash")) == 0
    assert [(it.shape.experts, it.shape.top_k) for it in asked] == [(64, 4)]


def test_a_shape_is_asked_for_as_it_is_stated(asked: list[LookupRequest]) -> None:
    assert main.main((*ASKED, "--shape", "E=8,N=256,K=512,topk=2")) == 0
    assert [it.shape for it in asked] == [MoEShape(8, 256, 512, 2)]


def test_without_a_table_the_default_is_named_with_the_file_that_is_missing(
    asked: list[LookupRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main((*ASKED, "--shape", "E=8,N=256,K=512,topk=2")) == 0
    (examined,) = document(capsys)["examined"]
    expected = "the engine's default: no table E=8,N=256,device_name=NVIDIA_H200.json"
    assert {it["why"] for it in examined["findings"]} == {expected}


def test_a_server_is_asked_of_sglang_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main((*ASKED, "--url", "http://127.0.0.1:9")) == 1
    assert "no SGLang is installed in this environment" in capsys.readouterr().err
