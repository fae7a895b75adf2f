"""`sglang-moe-ext report`: what it writes, its JSON, and one clear line for each mistake. No GPU, no engine."""

from __future__ import annotations

import builtins
import gzip
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sglang_moe_ext.cli import main
from sglang_moe_ext.cli import report as command
from tests.report.sources import GLM, GLM_H100, GLM_H200, GLM_VLLM, QWEN, REPO_ROOT


@pytest.fixture(autouse=True)
def an_empty_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))


def run(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> dict[str, Any]:
    assert main.main(["report", *map(str, arguments), "--output-dir", str(folder), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def one_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main.main(["report", *map(str, arguments)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    (line,) = lines
    assert line.startswith("error: ") and len(line) < 700
    return line


def test_a_journal_becomes_a_page_pictures_a_document_and_a_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = run(capsys, tmp_path / "page", QWEN)
    names = {path.name for path in (tmp_path / "page").iterdir()}
    pictures = {"gain.png", "time.png", "space.png", "regret.png", "error.png", "machine.png"}
    assert names == {"report.html", "report.json", "pull_request.md", *pictures}
    assert {Path(path).name for path in found["written"]} == names
    kept = json.loads((tmp_path / "page" / "report.json").read_text())
    assert kept == {name: value for name, value in found.items() if name != "written"}


KINDS: Mapping[str, type | tuple[type, ...]] = {
    "kind": str,
    "source": str,
    "name": str,
    "engine": str,
    "triton": str,
    "shape": str,
    "gpu": str,
    "environment": dict,
    "commands": list,
    "files": list,
    "tolerated_error": float,
    "mean_gain": float,
    "mean_kernels_gain": (float, type(None)),
    "entries": list,
    "space": (dict, type(None)),
    "regret": list,
    "notes": list,
}


@pytest.mark.parametrize("source", [GLM, GLM_H200, GLM_VLLM], ids=["journal", "SGLang table", "vLLM table"])
def test_the_document_has_one_schema_for_runs_and_tables(
    source: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = run(capsys, tmp_path, source)
    assert (found["format"], found["comparison"]) == (1, None)
    (of_run,) = found["reports"]
    assert of_run.keys() == KINDS.keys()
    for name, kind in KINDS.items():
        assert isinstance(of_run[name], kind), name
    entry = of_run["entries"][0]
    assert {"m", "origin", "up", "down", "stock_us", "tuned_us", "floor_us", "gain", "noise", "error"} <= entry.keys()
    assert entry["gain"].keys() == {"value", "low", "high"}


def test_two_runs_are_compared(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = run(capsys, tmp_path, "--compare", GLM_H200, GLM_H100)
    compared = found["comparison"]
    assert compared["warning"] == "the runs are of different GPUs"
    a, b = (of_run["entries"][0]["tuned_us"] for of_run in found["reports"])
    assert compared["entries"][0] == {"m": 1, "a_us": a, "b_us": b, "a_over_b": round(a / b, 4)}
    assert {"compare.png", "a-gain.png", "b-gain.png"} <= {path.name for path in tmp_path.iterdir()}


def test_several_tables_share_a_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = run(capsys, tmp_path, GLM_H200, GLM_VLLM)
    assert [one["engine"] for one in found["reports"]] == ["sglang", "vllm"]
    text = (tmp_path / "pull_request.md").read_text()
    assert "## Motivation" in text and "## Purpose" in text


def test_people_are_told_the_means_and_what_was_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main.main(["report", str(GLM_H200), "--output-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert re.search(r"GLM-4.7-Flash +NVIDIA H200 +20 +1\.\d{3}x of 20", printed.out)
    assert "report.html" in printed.out
    assert "read 1/1" in printed.err and "draw 6/6" in printed.err


def test_without_an_argument_the_newest_run_of_the_store_is_taken(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "no run in" in one_line(capsys)
    for day, source in (("01", QWEN), ("02", GLM)):
        folder = tmp_path / "store" / "runs" / f"2026-11-{day}T000000.000000Z-00000000"
        folder.mkdir(parents=True)
        (folder / "journal.jsonl").write_bytes(gzip.decompress(source.read_bytes()))
    (of_run,) = run(capsys, tmp_path / "page")["reports"]
    assert of_run["shape"].startswith("E=65,")


MISTAKES: Mapping[str, tuple[Sequence[object], Sequence[str]]] = {
    "no file": (["nowhere.jsonl"], ["nowhere.jsonl", "No such file"]),
    "no table": (["nowhere.json"], ["nowhere.json"]),
    "another kind": ([REPO_ROOT / "README.md"], ["README.md", ".jsonl.gz"]),
    "a control code": (["\x1b[31m.txt"], ["\\x1b[31m.txt"]),
    "down table": ([GLM_H200.with_name(f"{GLM_H200.stem}_down.json")], ["without _down"]),
    "provenance": ([GLM_H200.with_name(f"{GLM_H200.stem}.provenance.json")], ["provenance.json"]),
    "both": ([GLM_H200, "--compare", GLM_H200, GLM_H100], ["--compare", "leave"]),
    "too many": ([GLM_H200] * 25, ["25", "24"]),
    "no place": ([GLM_H200, "--output-dir", "/proc/nowhere"], ["/proc/nowhere", "--output-dir"]),
}


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(
    arguments: Sequence[object],
    said: Sequence[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = one_line(capsys, *arguments)
    assert all(part in line for part in said), line
    assert not (tmp_path / command.FOLDER).exists()


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_a_missing_extra_names_the_command_that_installs_it(
    missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ImportError(f"No module named '{name}'")
        return found(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    line = one_line(capsys, GLM_H200)
    assert line.endswith("pip install 'sglang-moe-ext[report]'") and missing in line


def test_nothing_is_imported_to_draw_until_something_is_drawn() -> None:
    program = (
        "import sys; from sglang_moe_ext.cli import main; main.parser()\n"
        "print(*sorted({'matplotlib', 'jinja2', 'numpy', 'PIL', 'torch', 'markupsafe'} & sys.modules.keys()))"
    )
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, capture_output=True, text=True, check=True, cwd=REPO_ROOT)
    assert done.stdout.strip() == ""


def test_a_disk_that_refuses_a_picture_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gain.png").mkdir()
    line = one_line(capsys, GLM_H200, "--output-dir", tmp_path)
    assert "gain.png" in line


def test_an_older_report_in_the_folder_is_replaced(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(capsys, tmp_path, GLM_H200)
    first = (tmp_path / "report.html").read_bytes()
    shutil.copy(tmp_path / "report.html", tmp_path / "kept.html")
    run(capsys, tmp_path, GLM_VLLM)
    assert (tmp_path / "report.html").read_bytes() != first == (tmp_path / "kept.html").read_bytes()


def test_the_picture_of_the_readme_is_what_its_command_draws(tmp_path: Path) -> None:
    line = 'sglang-moe-ext report "tuned_configs/configs/triton_3_6_0/E=65,N=1536,device_name=NVIDIA_H200.json"'
    assert line in (REPO_ROOT / "README.md").read_text(encoding="utf-8")
    kept = REPO_ROOT / "docs" / "images" / "gain.png"
    assert kept.stat().st_size < 100_000
    assert main.main(["report", str(GLM_H200), "--output-dir", str(tmp_path), "--quiet"]) == 0
    with Image.open(kept) as old, Image.open(tmp_path / "gain.png") as new:
        assert old.convert("RGB").tobytes() == new.convert("RGB").tobytes(), f"run `{line}`, and copy its gain.png"
