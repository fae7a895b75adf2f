"""The command that compares backends, where there is no GPU: what it prints of figures, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.cli import bench, main
from sglang_moe_ext.core import Failure
from sglang_moe_ext.tuning import backends
from sglang_moe_ext.tuning.backends import BackendComparison, TimedBackend
from sglang_moe_ext.tuning.search.statistics import Interval

FIGURES = BackendComparison(
    {
        "tuned": TimedBackend(100.0, Interval(1.0, 1.0, 1.0), 4e-3, "up 64x128x64", {"up": 60.0, "down": 30.0}),
        "ours": TimedBackend(80.0, Interval(1.25, 1.24, 1.26), 3e-3, "a plan", {}),
        "quack": Failure("EngineError", "quack.gemm_interface cannot be imported"),
    },
    floor_us=50.0,
    gemm_floor_us={"up": 33.0, "down": 17.0},
    noise=0.002,
    throttled=None,
)


def document(**more: Any) -> dict[str, Any]:
    layer = {
        "shape": "E=65", "gpu": "H100", "engine": "sglang", "engine_version": "0.5.15", "torch": "2.11",
        "triton": "3.6.0", "command": "sglang-moe-ext bench", "batch_sizes": {"64": bench._batch_document(FIGURES)},
    }  # fmt: skip
    return {**layer, **more}


def test_the_markdown_has_a_row_for_each_batch_size_with_speed_ups_and_the_reasons() -> None:
    text = bench.markdown(document())
    assert "| M | tuned | ours |" in text
    assert "| 64 | 100.0 | 80.0 (1.250x) |" in text
    assert "quack left out: quack.gemm_interface cannot be imported" in text
    assert text.startswith("E=65: H100, sglang 0.5.15, torch 2.11, Triton 3.6.0: `sglang-moe-ext bench`")


def test_a_layer_of_several_that_failed_has_no_table() -> None:
    assert bench.markdown({"layers": [{"shape": "E=8", "error": "no"}, document()]}).count("| M |") == 1


def test_the_document_is_json_with_intervals() -> None:
    found = json.loads(json.dumps(bench._batch_document(FIGURES)))
    assert found["backends"]["ours"]["gain"] == {"value": 1.25, "low": 1.24, "high": 1.26}
    assert found["backends"]["quack"] == {"left_out": "quack.gemm_interface cannot be imported"}


def test_people_see_the_share_of_the_roofline_and_why_one_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    bench.console.show(bench._grid(64, FIGURES))
    out = capsys.readouterr().out
    assert "M=64, roofline of both GEMMs 50.0 us; noise 0.2 %" in out
    assert "62%" in out
    assert "quack: left out: quack.gemm_interface cannot be imported" in out


def test_without_the_gpu_one_line_says_what_estimates_instead(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", "--model", "GLM-4.7-Flash", "--gpu", "H100"]) == 1
    err = capsys.readouterr().err
    assert "bench needs NVIDIA_H100" in err.replace(" ", "_") or "bench needs NVIDIA H100" in err
    assert "`plan --worth-it` estimates without them" in err


def test_a_folder_that_cannot_be_written_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "run", lambda *_: pytest.fail("nothing may be measured"))
    (tmp_path / "file").write_text("")
    assert main.main(["bench", "--model", "GLM-4.7-Flash", "--output-dir", str(tmp_path / "file" / "x")]) == 1
    assert "choose another --output-dir" in capsys.readouterr().err


def test_tune_names_the_command_where_it_is_asked_for_deep_gemm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["tune", "--model", "GLM-4.7-Flash", "--gpu", "H100", "--use-deep-gemm"]) == 1
    assert "`sglang-moe-ext bench --backends tuned deep_gemm` compares the two" in capsys.readouterr().err
