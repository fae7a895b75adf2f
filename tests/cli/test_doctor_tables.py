"""`sglang-moe-ext doctor` compares what runs with what is written, and names tables that are broken."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.cli import main
from sglang_moe_ext.cli.written_entry import describe_change
from sglang_moe_ext.core import MoEShape, TileConfig
from sglang_moe_ext.engines.lookup_probe import LookupRequest, LookupResult, ProbeModule
from sglang_moe_ext.engines.vllm import installation as vllm
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.models import parse_shape
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

    def examine(up: TileConfig, *files: Path, down: TileConfig | None = None) -> Mapping[str, Any]:
        def ask(request: LookupRequest, **_: Any) -> LookupResult:
            taken = dict.fromkeys(request.tokens, up)
            downs = dict.fromkeys(request.tokens, down)
            return LookupResult(VERSION, "3.7.1", "NVIDIA GB10", taken, downs, files, (), plugin="active")

        monkeypatch.setattr(ProbeModule, "ask", lambda _probe, request, *_: ask(request))
        assert main.main(["doctor", "--shape", LAYER, "--gpu", "GB10", "--batch-size", "64", "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)["examined"]
        return dict(found)

    return examine


def why(found: Mapping[str, Any]) -> str:
    return str(found["findings"][0]["why"])


def test_an_entry_that_was_fitted_is_said_to_be(table: Path, examined: Examined) -> None:
    table.write_text(config_table.to_json({1: FITS, 64: WRITTEN}))
    expected = (
        "its own entry; exact Triton; origin unknown: shipped with the engine, or a user's; fitted to 99 KiB of shared "
        "memory: num_stages 4 -> 3; the engine alone would end, since the entry asks for 144 KiB"
    )
    assert why(examined(FITTED, table)) == expected


def test_an_entry_that_runs_as_written_has_no_remark(table: Path, examined: Examined) -> None:
    table.write_text(config_table.to_json({64: FITS}))
    assert why(examined(FITS, table)).endswith("origin unknown: shipped with the engine, or a user's")


def test_a_table_in_vllms_form_is_never_called_an_entry_of_sglang(table: Path, examined: Examined) -> None:
    table.write_text(config_table.to_json({64: FITS}, triton_version="3.7.1"))
    found = examined(DEFAULT, table)
    assert why(found).startswith("the engine's default: ") and "'triton_version'" in why(found)
    (problem,) = found["problems"]
    assert problem.startswith(f"SGLang alone cannot read {table}: ValueError: invalid literal for int()")


def test_a_table_with_more_than_is_known_does_not_end_the_diagnosis(table: Path, examined: Examined) -> None:
    entries = json.loads(config_table.to_json({64: FITS}))
    table.write_text(json.dumps({m: entry | {"num_buffers_of_tomorrow": "many"} for m, entry in entries.items()}))
    assert examined(FITS, table)["findings"][0]["config"] == str(FITS)


def test_a_broken_table_of_the_store_is_named(tmp_path: Path, examined: Examined) -> None:
    broken = tmp_path / "store/tables/sglang/triton_3_7_1" / NAME
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    (problem,) = examined(DEFAULT)["problems"]
    assert problem.startswith(f"skipped: {broken} is not valid JSON")


def test_a_variable_that_points_too_deep_is_named_with_the_file_that_is_meant(
    tmp_path: Path, examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "moe" / "triton_3_7_1" / NAME
    path.parent.mkdir(parents=True)
    path.write_text(config_table.to_json({64: FITS}))
    monkeypatch.setenv("SGLANG_MOE_CONFIG_DIR", str(tmp_path / "moe"))
    without_configs, not_read = examined(DEFAULT)["problems"]
    assert "has no folder configs" in without_configs and "FileNotFoundError" in without_configs
    assert not_read.startswith(f"{path} is not read: expected it as {tmp_path / 'moe/configs'}")


@pytest.mark.parametrize(
    ("level", "folder", "count"), [("moe/configs", "moe", 1), ("moe/triton_3_7_1/configs", "moe", 2)], ids=str
)
def test_a_table_one_level_off_is_named(
    level: str, folder: str, count: int, tmp_path: Path, examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / level / NAME
    path.parent.mkdir(parents=True)
    path.write_text(config_table.to_json({64: FITS}))
    monkeypatch.setenv("SGLANG_MOE_CONFIG_DIR", str(tmp_path / folder))
    problems = examined(DEFAULT)["problems"]
    assert len(problems) == count and problems[-1].startswith(f"{path} is not read")


def test_a_folder_that_is_not_there_is_named(
    tmp_path: Path, examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_MOE_CONFIG_DIR", str(tmp_path / "nothing"))
    (problem,) = examined(DEFAULT)["problems"]
    assert f"SGLANG_MOE_CONFIG_DIR={tmp_path / 'nothing'} is not there" in problem


def test_a_table_in_the_other_engines_spelling_is_named(tmp_path: Path, examined: Examined) -> None:
    misspelt = tmp_path / "store/tables/sglang/triton_3_7_1" / NAME.replace("128, 128", "128,128")
    misspelt.parent.mkdir(parents=True)
    misspelt.write_text(config_table.to_json({64: FITS}))
    (problem,) = examined(DEFAULT)["problems"]
    assert problem.startswith(f"{misspelt} is named as vLLM does: SGLang alone asks for {NAME}")


def test_people_see_problems_too(table: Path, examined: Examined, capsys: pytest.CaptureFixture[str]) -> None:
    table.write_text("{")
    examined(DEFAULT)
    assert main.main(["doctor", "--shape", LAYER, "--gpu", "GB10", "--batch-size", "64"]) == 0
    assert f"problem: skipped: {table} is not valid JSON" in capsys.readouterr().out


def test_vllm_is_said_to_fit_an_entry_at_the_launch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    engine = vllm.VllmInstallation("0.33.0", tmp_path / "vllm", "3.7.1")
    monkeypatch.setattr(vllm, "find", lambda: engine)

    def ask(request: LookupRequest, **_: Any) -> LookupResult:
        taken = dict.fromkeys(request.tokens, FITTED)
        fitted: Any = {m: {"up": "fitted to 99 KiB of shared memory: num_stages 4 -> 3"} for m in request.tokens}
        said: Any = {"plugin": "active", "fitted": fitted}
        return LookupResult("0.33.0", "3.7.1", "NVIDIA GB10", taken, dict.fromkeys(taken), (), (), **said)

    monkeypatch.setattr(ProbeModule, "ask", lambda _probe, request, *_: ask(request))
    given = ["--engine", "vllm", "--shape", LAYER, "--gpu", "GB10", "--batch-size", "64", "--json"]
    assert main.main(["doctor", *given]) == 0
    (found,) = json.loads(capsys.readouterr().out)["examined"]
    assert "at the launch fitted to 99 KiB of shared memory: num_stages 4 -> 3" in why(found)


GB10 = specs.find("GB10")
SHAPE = parse_shape(LAYER)


@pytest.mark.parametrize(
    ("written", "taken", "said"),
    [
        (FITS, FITS, None),
        (
            TileConfig(16, 64, 128, 1, 4, 2, use_tma=True),
            TileConfig(16, 64, 128, 1, 4, 2),
            "USE_TMA True -> False: the",
        ),
        (TileConfig(64, 64, 128, 1, 4, 2), TileConfig(16, 64, 128, 1, 4, 2), "BLOCK_SIZE_M 64 -> 16: both GEMMs share"),
        (FITS, DEFAULT, "not as written: BLOCK_SIZE_M 16 -> 64, GROUP_SIZE_M 8 -> 32, num_stages 2 -> 3"),
    ],
    ids=["as written", "TMA", "one sort", "something else"],
)
def test_each_change_is_named_with_its_reason(written: TileConfig, taken: TileConfig, said: str | None) -> None:
    found = describe_change(written, taken, SHAPE, GB10)
    assert found is None if said is None else (found or "").startswith(said)


def test_a_change_that_shared_memory_does_not_explain_is_not_blamed_on_it() -> None:
    shape = MoEShape(8, 64, 64, 2)
    assert "fitted" not in (describe_change(FITS, DEFAULT, shape, specs.find("H200")) or "")
