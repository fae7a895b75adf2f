"""`sglang-moe-ext patch`: what it says, and whether it says that a patch is needed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.cli import main as command_line
from sglang_moe_ext.cli import patch
from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines.sglang import installation, source_patch
from sglang_moe_ext.engines.sglang.installation import SglangInstallation
from tests.engines.sglang.test_source_patch import laid_out, original, patch_of

VERSION = "0.5.15"


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SglangInstallation:
    """An SGLang of which only the layer module and the caller of plugins are there, with no way in of ours."""
    engine = laid_out(VERSION, tmp_path / "site")
    (engine.root / "srt" / "plugins").mkdir()
    (engine.root / "srt" / "plugins" / "__init__.py").touch()
    monkeypatch.setattr(installation, "find", lambda: engine)
    monkeypatch.setattr("site.getsitepackages", lambda: [str(tmp_path / "python")])
    monkeypatch.setattr("site.ENABLE_USER_SITE", False)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: ())
    return engine


def has_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = argparse.Namespace(name="sglang_moe_ext")
    monkeypatch.setattr(
        "importlib.metadata.entry_points", lambda group: (point,) if group == source_patch.GROUP else ()
    )


def has_startup_file(folder: Path) -> None:
    folder.mkdir()
    (folder / source_patch.STARTUP_FILE).touch()


def said(capsys: pytest.CaptureFixture[str], flag: str) -> tuple[str, dict[str, Any]]:
    assert command_line.main(["patch", flag, "--json"]) == 0
    printed = capsys.readouterr()
    return printed.err, json.loads(printed.out)


def test_applied_and_reverted_the_engine_is_as_it_was(
    engine: SglangInstallation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, "--apply")[1]["state"] == "applied"
    assert said(capsys, "--revert")[1]["state"] == "not applied"
    assert patch_of(VERSION).file(engine).read_bytes() == original(VERSION)


def test_what_is_applied_already_is_said_to_be(engine: SglangInstallation, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "--apply")
    lines, document = said(capsys, "--apply")
    assert "applied already" in lines
    assert document["changed"] is False


def test_status_changes_nothing(engine: SglangInstallation, capsys: pytest.CaptureFixture[str]) -> None:
    lines, document = said(capsys, "--status")
    assert f"SGLang {VERSION}: {patch_of(VERSION).file(engine)}: not applied" in lines
    assert document["changed"] is False
    assert patch_of(VERSION).file(engine).read_bytes() == original(VERSION)


def test_status_names_a_file_that_is_not_the_releases(
    engine: SglangInstallation, capsys: pytest.CaptureFixture[str]
) -> None:
    patch_of(VERSION).file(engine).write_text("mine\n")
    assert said(capsys, "--status")[1]["state"] == "unknown contents"


def test_where_no_way_in_is_there_a_patch_is_needed(
    engine: SglangInstallation, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, document = said(capsys, "--status")
    assert "a patch is needed" in lines
    assert document["needed_for"] == "all processes"


def test_the_entry_point_leaves_what_does_not_call_plugins(
    engine: SglangInstallation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    has_entry_point(monkeypatch)
    assert "bench_one_batch" in said(capsys, "--status")[1]["needed_for"]


def test_an_engine_that_calls_no_plugins_has_no_entry_point(
    engine: SglangInstallation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    has_entry_point(monkeypatch)
    (engine.root / "srt" / "plugins" / "__init__.py").unlink()
    assert said(capsys, "--status")[1]["needed_for"] == "all processes"


def test_the_startup_file_leaves_nothing(
    engine: SglangInstallation, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    has_startup_file(tmp_path / "python")
    lines, document = said(capsys, "--status")
    assert "no patch is needed" in lines
    assert document["needed_for"] is None


def test_a_startup_file_in_a_folder_of_the_path_is_none(
    engine: SglangInstallation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    has_startup_file(tmp_path / "target")
    monkeypatch.syspath_prepend(str(tmp_path / "target"))
    assert said(capsys, "--status")[1]["startup_file"] is None


def test_without_an_engine_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "find", lambda: None)
    with pytest.raises(EngineError, match="not installed in this environment: run patch where the server runs"):
        patch.run(argparse.Namespace(apply=False, revert=False, status=True))


def test_no_flag_is_a_usage_error() -> None:
    parser = argparse.ArgumentParser()
    patch.add_to(parser)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args([])
    assert ended.value.code == 2
