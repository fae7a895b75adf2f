"""The main job against a real SGLang: tune for a GPU that is not here, and let the engine say what it takes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.cli import main as command_line
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.tables import config_table, files, merge, provenance
from sglang_moe_ext.tables.merge import RefusedTable, StoredTable
from tests.engines.installed import ENGINES_DIR, REPO_ROOT

VERSION = "0.5.23"
RTX_4090_SMEM = 101_376
NAME = "E=65,N=1536,device_name=NVIDIA_GeForce_RTX_4090.json"
ARGUMENTS = ("--model", "GLM-4.7-Flash", "--tp-size", "1", "--gpu", "RTX_4090")


pytestmark = pytest.mark.usefixtures("forked_engines")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of compiled kernels: each test after the first that tunes a layer for a GPU finds them there, as a user does."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def engine(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of a real SGLang, by links, as the engine of this process and its children; gives its configs."""
    site = tmp_path / "site"
    subprocess.run(["cp", "-al", ENGINES_DIR / "sglang" / VERSION, site], check=True)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(REPO_ROOT), str(site))))
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("SGLANG_MOE_CONFIG_DIR", raising=False)
    monkeypatch.setattr(specs, "detect", lambda: None)
    yield site / "sglang/srt/layers/moe/moe_runner/triton_utils/configs"


def document_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def table_of(configs: Path, name: str = NAME) -> Path:
    (found,) = configs.glob(f"triton_*/{name}")
    return found


def test_the_whole_job_without_a_gpu(engine: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command_line.main(("tune", *ARGUMENTS, "--json")) == 0
    done = document_of(capsys)
    assert done["origin"] == "predicted"
    assert done["picked_up"] is True

    path = table_of(engine)
    known = provenance.read(path)
    assert known is not None
    assert sorted(known.entries) == sorted(config_table.read(path))
    for entry in known.entries.values():
        assert entry.origin == "predicted"
        assert entry.figures["up_smem_bytes"] <= RTX_4090_SMEM
        assert entry.figures["down_smem_bytes"] <= RTX_4090_SMEM
    kept = tmp_path / "store" / "tables" / "sglang" / path.parent.name / NAME
    assert kept.read_text() == path.read_text()

    # an upgrade of the engine takes its copy away, and install puts it back
    path.unlink()
    assert command_line.main(("install", "--json")) == 0
    assert document_of(capsys)["written"] == [str(path), str(path.with_name(NAME.replace(".json", "_down.json")))]
    assert kept.read_text() == path.read_text()

    # doctor tells the same story of the whole store, and calls the entries predicted
    assert command_line.main(("doctor", "--json", "--batch-size", "1", "3", "100000")) == 0
    (examined,) = document_of(capsys)["examined"]
    assert {finding["M"] for finding in examined["findings"]} == {1, 3, 100000}
    assert all("predicted" in finding["why"] for finding in examined["findings"])


def test_a_predicted_table_never_replaces_a_measured_one(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = engine / "triton_3_6_0" / "E=128,N=704,device_name=NVIDIA_H200.json"
    before = measured.read_text()
    assert (
        command_line.main(("tune", "--shape", "E=128,N=704,K=2048,topk=8", "--gpu", "H200", "--batch-size", "64")) == 1
    )
    assert "takes a measured table for this layer" in capsys.readouterr().err
    assert measured.read_text() == before
    assert not list(engine.glob("triton_3_7_1/E=128,N=704,device_name=NVIDIA_H200*.json"))


def no_engine(*_: object) -> None:
    raise AssertionError("an engine was started")


def test_a_measured_table_that_is_shipped_is_said_at_once(
    engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_moe_ext.engines.sglang.adapter.start_probe", no_engine)
    assert command_line.main(("tune", "--model", "GLM-4.7-Flash", "--gpu", "H200")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "is shipped with this package" in line and "--force" in line


def test_with_force_a_prediction_goes_on_and_gives_no_advice_that_would_hide_the_measured_table(
    engine: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = (
        "--model",
        "GLM-4.7-Flash",
        "--gpu",
        "H200",
        "--batch-size",
        "64",
        "--output-dir",
        str(tmp_path / "mine"),
    )
    assert command_line.main(("tune", *arguments, "--force")) == 0
    out = capsys.readouterr().out
    assert "SGLANG_MOE_CONFIG_DIR" not in out.rpartition("\n{")[0]


def test_a_read_only_store_is_noticed_before_any_work(
    engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    writable = files.is_writable
    monkeypatch.setattr(
        files, "is_writable", lambda folder: tmp_path / "store" not in folder.parents and writable(folder)
    )
    monkeypatch.setattr("sglang_moe_ext.engines.sglang.adapter.start_probe", no_engine)
    assert command_line.main(("tune", *ARGUMENTS, "--batch-size", "64")) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "SGLANG_MOE_EXT_STORE" in line


def test_a_read_only_engine_gets_an_overlay_and_one_line(
    engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Permission bits do not stop root, whom tests may run as: the answer of the check is what is set here.
    writable = files.is_writable
    monkeypatch.setattr(files, "is_writable", lambda folder: engine not in folder.parents and writable(folder))
    assert command_line.main(("tune", *ARGUMENTS, "--batch-size", "64", "--json")) == 0
    captured = capsys.readouterr()
    (note,) = (line for line in captured.err.splitlines() if "is read-only" in line)
    overlay = tmp_path / "store" / "overlay" / f"sglang-{VERSION}"
    assert f"SGLANG_MOE_CONFIG_DIR={overlay}" in note
    assert json.loads(captured.out)["picked_up"] is True
    assert not list(engine.glob(f"triton_*/{NAME}"))
    shipped = {path.name for path in engine.glob("triton_3_6_0/*.json")}
    assert shipped <= {path.name for path in (overlay / "configs" / "triton_3_6_0").iterdir()}


def test_output_dir_is_written_and_read_where_the_server_is_told_to(
    engine: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert (
        command_line.main(("tune", *ARGUMENTS, "--batch-size", "64", "--output-dir", str(tmp_path / "mine"), "--json"))
        == 0
    )
    done = document_of(capsys)
    assert done["picked_up"] is True
    assert done["environment"] == {"SGLANG_MOE_CONFIG_DIR": str(tmp_path / "mine")}
    assert not list(engine.glob(f"triton_*/{NAME}"))


def test_a_table_that_the_engine_does_not_take_fails_the_command(
    engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put = merge.put

    def put_and_lose(changes: dict[Path, StoredTable], pairs: Any, text: Any) -> dict[Path, StoredTable | RefusedTable]:
        stored = put(changes, pairs, text)
        for path in stored:
            path.unlink()
        return stored

    monkeypatch.setattr(merge, "put", put_and_lose)
    assert command_line.main(("tune", *ARGUMENTS, "--batch-size", "64")) == 1
    assert "did not read" in capsys.readouterr().err


def test_the_warning_line_of_the_engine_is_enough(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        f"Performance might be sub-optimal! Config file not found at {engine}/triton_3_7_1/{NAME}, you can create them"
    )
    assert command_line.main(("tune", "--from-log", line, "--batch-size", "1", "--dry-run", "--json")) == 0
    done = document_of(capsys)
    assert done["model"] == "GLM-4.7-Flash"
    assert done["names"]["SGLang"] == NAME
    assert done["names"]["vLLM"] == NAME.replace("E=65", "E=64")
    assert sum(done["dropped"].values()) + done["kept"] == 1920
