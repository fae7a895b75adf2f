"""The tune command and its measuring: what is refused where nothing can be measured, and what a comparison prints."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.cli import main as command_line
from sglang_moe_ext.cli import tune
from sglang_moe_ext.core import Failure, MoEExtError, TileConfig
from sglang_moe_ext.engines import installed_engines
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.tables import config_table
from sglang_moe_ext.tuning import compare_configs, install_target, pipeline
from sglang_moe_ext.tuning.compare_configs import TODAY, ConfigComparison, TimedConfig
from sglang_moe_ext.tuning.compile.kernel_source import KernelSource
from sglang_moe_ext.tuning.config_args import Choices
from sglang_moe_ext.tuning.request import MeasureOptions, Progress, TuneRequest
from sglang_moe_ext.tuning.run import session
from sglang_moe_ext.tuning.search.statistics import Interval
from tests.engines.installed import ENGINES_DIR

GLM = ("--model", "GLM-4.7-Flash", "--batch-size", "64")
SIX = ("64", "128", "64", "16", "4", "3")
NOW, GIVEN = TileConfig(16, 32, 64, 1, 4, 3), TileConfig(64, 128, 64, 16, 4, 3)
H200 = "NVIDIA H200"
NO_GPU, ELSEWHERE = "this machine has no GPU", "RTX 4090 is not here"


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(specs, "detect", lambda: None)
    return tmp_path / "store"


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with that GPU and an engine, as far as the flags can see."""
    monkeypatch.syspath_prepend(str(ENGINES_DIR / "sglang" / "0.5.23"))
    monkeypatch.setattr(specs, "detect", lambda: find_gpu(H200))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: H200)


Finding = TimedConfig | Failure


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, h200: None) -> Callable[[Finding, Finding], list[Choices]]:
    """Sets what the GPU says of today's choice and of each given one; gives what it was asked to compare."""
    asked: list[Choices] = []

    def answering(today: Finding, given: Finding) -> list[Choices]:
        def compare(request: TuneRequest, measuring: MeasureOptions, choices: Choices, progress: Progress) -> Any:
            asked.append(choices)
            pairs = {TODAY: {"up": NOW, "down": NOW}, **{name: by_m[64] for name, by_m in choices.items()}}
            return {64: ConfigComparison(pairs, {TODAY: today, **dict.fromkeys(choices, given)}, 0.001, None)}

        monkeypatch.setattr(compare_configs, "run", compare)
        return asked

    return answering


def error_of(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert command_line.main(("tune", *GLM, *flags)) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def printed(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[str, Mapping[str, Any]]:
    assert command_line.main(("tune", *GLM, *flags, "--json")) == 0
    said = capsys.readouterr()
    return said.err, json.loads(said.out)


TODAY_RAN = TimedConfig(306.3, Interval(1, 1, 1), 4e-3)
FASTER = TimedConfig(200.0, Interval(1.53, 1.5, 1.56), 4e-3)


@pytest.mark.parametrize(
    ("flags", "culprit", "why"),
    [
        (("--configs", *SIX), "--configs", NO_GPU),
        (("--cmp-configs", "a.json"), "--cmp-configs", NO_GPU),
        (("--configs", *SIX, "--gpu", "RTX_4090"), "--configs", NO_GPU),
        (("--resume", "--gpu", "RTX_4090"), "--resume", ELSEWHERE),
        (("--gpus", "nonsense", "--gpu", "RTX_4090"), "--gpus", ELSEWHERE),
        (("--budget", "60", "--gpu", "RTX_4090"), "--budget", ELSEWHERE),
        (("--effort", "quick", "--gpu", "RTX_4090"), "--effort", ELSEWHERE),
        (("--routing", "zipf", "--gpu", "RTX_4090"), "--routing", ELSEWHERE),
        (("--topk-ids-dir", "x", "--gpu", "RTX_4090"), "--topk-ids-dir", ELSEWHERE),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_about_measuring_is_refused_where_nothing_is_measured(
    flags: tuple[str, ...], culprit: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_of(capsys, *flags)
    assert line.startswith(f"error: {culprit} is about measuring, and ")
    assert why in line


def test_a_comparison_for_another_gpu_than_this_one_is_refused(h200: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert ELSEWHERE in error_of(capsys, "--gpu", "RTX_4090", "--configs", *SIX)


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        (("--gpus", "first"), "--gpus 'first' makes no sense"),
        (("--gpus", "0,0"), "names a GPU twice"),
        (("--gpus", "3"), "GPU 3 is not visible"),
        (("--topk-ids-dir", "/nowhere"), "/nowhere"),
        (("--configs", "64", "128"), "expected 6 numbers"),
        (("--configs", "64", "128", "64", "16", "3", "3"), "num_warps=3"),
        (("--cmp-configs", "/nowhere.json"), "/nowhere.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_nonsense_is_one_line_where_the_gpu_is_here(
    flags: tuple[str, ...], culprit: str, h200: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert culprit in error_of(capsys, *flags)


def test_a_comparison_prints_the_gain_with_its_interval(
    answers: Callable[[Finding, Finding], list[Choices]], capsys: pytest.CaptureFixture[str]
) -> None:
    answers(TODAY_RAN, FASTER)
    table, _ = printed(capsys, "--configs", *SIX)
    (row,) = (line for line in table.splitlines() if "given 1  both" in line)
    assert row.split()[-5:] == ["200.0", "1.53x", "[1.50,", "1.56]", "4e-03"]


def test_a_comparison_ends_with_a_document(
    answers: Callable[[Finding, Finding], list[Choices]], capsys: pytest.CaptureFixture[str]
) -> None:
    answers(TODAY_RAN, FASTER)
    _, document = printed(capsys, "--configs", *SIX)
    (of_m,) = document["comparisons"]
    assert [(it["choice"], it["us"], it["gain"], it["right"]) for it in of_m["choices"]] == [
        (TODAY, 306.3, 1.0, True),
        ("--configs 64 128 64 16 4 3", 200.0, 1.53, True),
    ]


def test_a_comparison_writes_nothing(
    answers: Callable[[Finding, Finding], list[Choices]], store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(TODAY_RAN, FASTER)
    printed(capsys, "--configs", *SIX)
    assert not store.exists()


def test_numbers_and_files_are_compared_together(
    answers: Callable[[Finding, Finding], list[Choices]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = answers(TODAY_RAN, FASTER)
    file = tmp_path / "mine.json"
    file.write_text(config_table.to_json({64: NOW}), encoding="utf-8")
    printed(capsys, "--cmp-configs", str(file), "--configs", *SIX)
    assert asked == [
        {
            "--configs 64 128 64 16 4 3": {64: {"up": GIVEN, "down": GIVEN}},
            str(file): {64: {"up": NOW, "down": NOW}},
        }
    ]


@pytest.mark.parametrize(
    ("today", "given", "said"),
    [
        (TODAY_RAN, Failure("OutOfResources", "too\nmuch"), "OutOfResources: too much"),
        (TODAY_RAN, TimedConfig(1.0, Interval(9, 9, 9), 0.5), "5e-01 WRONG"),
        (TODAY_RAN, TimedConfig(1.0, Interval(9, 9, 9), float("inf")), "inf WRONG"),
        (TODAY_RAN, TimedConfig(1.0, Interval(9, 9, 9), Failure("Timeout", "60 s")), "unknown: Timeout: 60 s"),
        (Failure("OutOfResources", "x"), TimedConfig(1.0, None, 4e-3), "today fails"),
    ],
    ids=["cannot run", "wrong", "not finite", "cannot be checked", "today cannot run"],
)
def test_what_is_wrong_with_a_choice_is_said(
    today: Finding,
    given: Finding,
    said: str,
    answers: Callable[[Finding, Finding], list[Choices]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers(today, given)
    assert said in printed(capsys, "--configs", *SIX)[0]


@pytest.mark.parametrize(
    "given",
    [Failure("Crash", "x"), TimedConfig(1.0, None, float("nan")), TimedConfig(1.0, None, Failure("Timeout", "x"))],
    ids=["cannot run", "nan", "cannot be checked"],
)
def test_the_document_of_what_is_not_right_is_json_and_says_so(
    given: Finding, answers: Callable[[Finding, Finding], list[Choices]], capsys: pytest.CaptureFixture[str]
) -> None:
    answers(TODAY_RAN, given)
    _, document = printed(capsys, "--configs", *SIX)
    assert [it["right"] for it in document["comparisons"][0]["choices"]] == [True, False]


def test_a_new_run_says_that_an_interrupted_one_could_go_on(h200: None, caplog: pytest.LogCaptureFixture) -> None:
    request = tune.request_of(tune.parser().parse_args(GLM), "")
    assert request.measuring is not None
    source = KernelSource("kernel", "module", "fingerprint", is_engines_own=True)
    with session.open_run(request, request.measuring, source) as interrupted:
        pass
    with caplog.at_level(logging.WARNING), session.open_run(request, request.measuring, source):
        pass
    assert f"{interrupted.folder}: --resume would go on with it" in caplog.text


def test_a_first_run_says_nothing_of_interrupted_ones(h200: None, caplog: pytest.LogCaptureFixture) -> None:
    request = tune.request_of(tune.parser().parse_args(GLM), "")
    assert request.measuring is not None
    source = KernelSource("kernel", "module", "fingerprint", is_engines_own=True)
    with session.open_run(request, request.measuring, source):
        assert "--resume" not in caplog.text


WAITING = ("tune", *GLM, "--for-server", "1", "--deadline", "60", "--json")


def test_for_a_server_a_layer_with_a_measured_table_needs_no_run(
    store: Path, h200: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = install_target.store_folder("sglang", str(installed_engines.running_triton()))
    folder.mkdir(parents=True)
    table = folder / "E=65,N=1536,device_name=NVIDIA_H200.json"
    table.write_text(config_table.to_json({64: NOW}))
    assert command_line.main(WAITING) == 0
    assert json.loads(capsys.readouterr().out) == {
        "needless": f"a measured table for this layer is in your own store, {table}"
    }


def test_for_a_server_a_table_of_another_triton_is_not_enough(
    store: Path, h200: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install_target.store_folder("sglang", "3.0.0")
    folder.mkdir(parents=True)
    (folder / "E=65,N=1536,device_name=NVIDIA_H200.json").write_text(config_table.to_json({64: NOW}))
    asked: list[TuneRequest] = []

    def run(request: TuneRequest, progress: Progress) -> Any:
        asked.append(request)
        raise MoEExtError("measured")

    monkeypatch.setattr(pipeline, "run", run)
    assert command_line.main(WAITING) == 1
    assert [request.measuring is not None and request.measuring.deadline is not None for request in asked] == [True]
