"""`sglang-moe-ext doctor` says how what runs differs from what is written, and what is odd about the tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.cli import main
from sglang_moe_ext.core import TileConfig
from sglang_moe_ext.engines.lookup_probe import LookupRequest, LookupResult, ProbeModule
from sglang_moe_ext.engines.vllm import installation as vllm
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.tables import config_table
from tests.engines.installed import ENGINES_DIR

VERSION = "0.5.23"
LAYER = "E=256,N=512,K=2048,topk=8,dtype=fp8_w8a8,block_shape=[128,128]"
NAME = "E=256,N=512,device_name=NVIDIA_GB10,dtype=fp8_w8a8,block_shape=[128, 128].json"
WRITTEN, FITTED = TileConfig(128, 256, 128, 8, 8, 4), TileConfig(128, 256, 128, 8, 8, 3)
DEFAULT = TileConfig(64, 128, 128, 32, 4, 3)
FITS = TileConfig(16, 128, 128, 8, 4, 2)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real SGLang, and nothing of this machine's store and GPU."""
    monkeypatch.syspath_prepend(str(ENGINES_DIR / "sglang" / VERSION))
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(specs, "detect", lambda: None)
    monkeypatch.setattr(vllm, "find", lambda: None)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where SGLang reads the table of the layer, in a folder that the user named to it."""
    path = tmp_path / "moe" / "configs" / "triton_3_7_1" / NAME
    path.parent.mkdir(parents=True)
    monkeypatch.setenv("SGLANG_MOE_CONFIG_DIR", str(tmp_path / "moe"))
    return path


Examined = Callable[..., Mapping[str, Any]]


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Examined:
    """What doctor says of the layer at M=64, where the engine answers that it takes `up` out of `files`."""

    def examine(up: TileConfig, *files: Path, **said: Any) -> Mapping[str, Any]:
        def ask(_: ProbeModule, request: LookupRequest) -> LookupResult:
            taken = dict.fromkeys(request.tokens, up)
            downs = dict.fromkeys(request.tokens)
            return LookupResult(VERSION, "3.7.1", "NVIDIA GB10", taken, downs, files, (), plugin="active", **said)

        monkeypatch.setattr(ProbeModule, "ask", ask)
        assert main.main(["doctor", "--shape", LAYER, "--gpu", "GB10", "--batch-size", "64", "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)["examined"]
        return dict(found)

    return examine


def why(found: Mapping[str, Any]) -> str:
    return str(found["findings"][0]["why"])


CHANGE = "fitted to 99 KiB: num_stages 4 -> 3; the engine alone would end"


def test_an_entry_that_was_fitted_is_said_to_be(table: Path, examined: Examined) -> None:
    table.write_text(config_table.to_json({1: FITS, 64: WRITTEN}))
    found = examined(FITTED, table, fitted={64: {"up": CHANGE}})
    assert why(found).startswith("its own entry; exact Triton; ") and why(found).endswith(f"; {CHANGE}")


def test_an_entry_that_runs_as_written_has_no_remark(table: Path, examined: Examined) -> None:
    table.write_text(config_table.to_json({64: FITS}))
    assert why(examined(FITS, table)).endswith("origin unknown: shipped with the engine, or a user's")


def test_a_table_with_more_than_is_known_does_not_end_the_diagnosis(table: Path, examined: Examined) -> None:
    entries = json.loads(config_table.to_json({64: FITS}))
    table.write_text(json.dumps({m: entry | {"num_buffers_of_tomorrow": "many"} for m, entry in entries.items()}))
    assert examined(FITS, table)["findings"][0]["config"] == str(FITS)


def test_people_see_problems_too(examined: Examined, capsys: pytest.CaptureFixture[str]) -> None:
    examined(DEFAULT, remarks=("an odd file",))
    assert main.main(["doctor", "--shape", LAYER, "--gpu", "GB10", "--batch-size", "64"]) == 0
    assert "problem: an odd file\n" in capsys.readouterr().out


def test_vllm_is_said_to_fit_an_entry_at_the_launch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    engine = vllm.VllmInstallation("0.33.0", tmp_path / "vllm", "3.7.1")
    monkeypatch.setattr(vllm, "find", lambda: engine)

    def ask(_: ProbeModule, request: LookupRequest) -> LookupResult:
        taken = dict.fromkeys(request.tokens, FITTED)
        none, fitted = dict.fromkeys(taken), {m: {"up": CHANGE} for m in taken}
        return LookupResult("0.33.0", "3.7.1", "GB10", taken, none, (), (), plugin="active", fitted=fitted)  # type: ignore[arg-type]

    monkeypatch.setattr(ProbeModule, "ask", ask)
    given = ["--engine", "vllm", "--shape", LAYER, "--gpu", "GB10", "--batch-size", "64", "--json"]
    assert main.main(["doctor", *given]) == 0
    (found,) = json.loads(capsys.readouterr().out)["examined"]
    assert why(found).endswith(f"; {CHANGE}")


def test_what_the_engine_itself_remarks_is_a_problem(examined: Examined) -> None:
    assert examined(DEFAULT, remarks=("an odd file",))["problems"] == ["an odd file"]


VLLM_LINE = (
    "Using default MoE config. Performance might be sub-optimal! Config file not found at "
    "/usr/lib/python3/dist-packages/vllm/model_executor/layers/fused_moe/configs/"
    "E=64,N=1536,device_name=NVIDIA_H200.json"
)


def test_a_line_of_vllms_log_is_examined_in_vllm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(vllm, "find", lambda: vllm.VllmInstallation("0.33.0", tmp_path / "vllm", "3.7.1"))
    asked: list[str] = []

    def ask(probe: ProbeModule, request: LookupRequest) -> LookupResult:
        asked.append(probe.engine)
        taken = dict.fromkeys(request.tokens, FITS)
        return LookupResult("0.33.0", "3.7.1", "NVIDIA H200", taken, dict.fromkeys(taken), (), (), plugin="active")

    monkeypatch.setattr(ProbeModule, "ask", ask)
    given = ["doctor", "--from-log", VLLM_LINE, "--model", "GLM-4.7-Flash", "--batch-size", "64", "--json"]
    assert main.main(given) == 0
    (found,) = json.loads(capsys.readouterr().out)["examined"]
    assert (asked, found["engine"], found["findings"][0]["gemm"]) == (["vLLM"], "vLLM", "both")
