"""The command line as a whole: one parser by every way in, its streams, its exit status, its help."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import sglang_moe_ext
from sglang_moe_ext.cli import command, engine_choice, main, tune
from sglang_moe_ext.cli.command import Command
from sglang_moe_ext.core import StoreError
from sglang_moe_ext.engines.sglang import installation as sglang
from sglang_moe_ext.engines.sglang.installation import SglangInstallation
from sglang_moe_ext.engines.vllm import installation as vllm
from sglang_moe_ext.engines.vllm.installation import VllmInstallation
from sglang_moe_ext.gpu import specs

REPO_ROOT = Path(sglang_moe_ext.__file__).parents[1]
NAMES = [one.name for one in main.COMMANDS]
DRY_RUN = ("tune", "--model", "Qwen3-30B-A3B", "--gpu", "RTX_5090", "--batch-size", "64", "--dry-run")


@pytest.fixture(autouse=True)
def no_engine_and_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(specs, "detect", lambda: None)
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))


def run_python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "100"}
    line = [sys.executable, *arguments]
    return subprocess.run(line, text=True, check=False, cwd=REPO_ROOT, env=environment, **options)


def test_every_way_to_call_a_command_is_one_parser() -> None:
    ways = (["-m", "sglang_moe_ext", "tune"], ["-m", "sglang_moe_ext.tune"], ["-m", "sglang_moe_ext", "help", "tune"])
    said = {run_python(*way, *(() if "help" in way else ("--help",)), capture_output=True).stdout for way in ways}
    (text,) = said
    assert text.startswith("usage: sglang-moe-ext tune ")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"sglang-moe-ext {sglang_moe_ext.__version__}\n")


def subparsers() -> Mapping[str, argparse.ArgumentParser]:
    (action,) = (it for it in main.parser()._actions if isinstance(it, argparse._SubParsersAction))
    found: dict[str, argparse.ArgumentParser] = action.choices
    return found


def flags() -> list[tuple[str, argparse.Action]]:
    return [
        (f"{name} {action.option_strings[0]}", action)
        for name, parser in subparsers().items()
        for action in parser._actions
        if action.option_strings
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_command_has_a_description_and_examples(name: str) -> None:
    parser = subparsers()[name]
    assert parser.description and len(parser.description) > 60
    assert parser.epilog and f"sglang-moe-ext {name}" in parser.epilog


@pytest.mark.parametrize("name", NAMES)
def test_every_example_of_a_command_parses(name: str) -> None:
    (one,) = (it for it in main.COMMANDS if it.name == name)
    for line, _ in one.examples:
        words = shlex.split(line.removeprefix('eval "$(').partition(" | ")[0])
        assert words[0] == "sglang-moe-ext"
        assert main.parser().parse_args(words[1:]).command == name


@pytest.mark.parametrize(("flag", "action"), flags(), ids=[flag for flag, _ in flags()])
def test_a_flag_says_what_it_means(flag: str, action: argparse.Action) -> None:
    assert action.help, flag
    assert action.help == argparse.SUPPRESS or len(action.help.split()) >= 3, action.help


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_the_flags_that_all_share(name: str) -> None:
    known = {flag for action in subparsers()[name]._actions for flag in action.option_strings}
    assert {"--json", "--quiet", "--help"} <= known


def test_json_is_alone_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*DRY_RUN, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["dry_run"] is True
    assert "batch size" in printed.err


def test_people_are_shown_no_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*DRY_RUN]) == 0
    printed = capsys.readouterr()
    assert "batch size" in printed.out
    assert '{"' not in printed.out


@pytest.mark.parametrize("flags", [("--quiet",), ("--quiet", "--json")], ids=" ".join)
def test_quiet_prints_nothing_for_people(flags: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    assert main.main([*DRY_RUN, *flags]) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    assert (json.loads(printed.out)["dry_run"] is True) if "--json" in flags else printed.out == ""


def test_an_error_is_a_document_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["tune", "--model", "no-such-model", "--gpu", "H200", "--json"]) == 1
    printed = capsys.readouterr()
    assert "no-such-model" in json.loads(printed.out)["error"]
    assert printed.err.startswith("error: ")


def a_command(run: Any) -> Command:
    return Command("it", "", "", (), lambda parser: None, run, lambda arguments: "stopped; nothing was written")


def ended_with(run: Any) -> int:
    return command.execute(a_command(run), argparse.Namespace(json=False, quiet=False))


def test_an_interrupt_ends_with_130_and_says_what_it_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: argparse.Namespace) -> Mapping[str, Any]:
        raise KeyboardInterrupt

    assert ended_with(interrupted) == 130
    assert capsys.readouterr().err == "stopped; nothing was written\n"


@pytest.mark.parametrize(("is_measuring", "said"), [(True, "; --resume continues this run"), (False, "at all")])
def test_an_interrupted_run_is_told_of_resume_only_where_it_measured(is_measuring: bool, said: str) -> None:
    arguments = argparse.Namespace(configs=None, cmp_configs=(), is_measuring=is_measuring)
    assert tune.COMMAND.stopped(arguments).endswith(said)


def test_an_error_ends_with_1_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def failing(_: argparse.Namespace) -> Mapping[str, Any]:
        raise StoreError("cannot write /x: no space")

    assert ended_with(failing) == 1
    assert capsys.readouterr().err == "error: cannot write /x: no space\n"


def test_an_error_that_nobody_foresaw_is_not_called_a_full_disk() -> None:
    def failing(_: argparse.Namespace) -> Mapping[str, Any]:
        raise FileNotFoundError("a bug")

    with pytest.raises(FileNotFoundError):
        ended_with(failing)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["people", "json"])
def test_a_full_disk_under_standard_output_is_one_line(flags: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = run_python("-m", "sglang_moe_ext", *DRY_RUN, *flags, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == "error: cannot write to standard output: No space left on device"


@pytest.fixture
def vllm_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = VllmInstallation("0.33.0", tmp_path / "vllm", "3.7.1")
    monkeypatch.setattr(vllm, "find", lambda: engine)
    monkeypatch.setattr(sglang, "find", lambda: None)


GIVEN = ("--model", "GLM-4.7-Flash", "--gpu", "H200")


def engine_of(*flags: str) -> str:
    return tune.request_of(tune.parser().parse_args([*GIVEN, *flags]), "").engine


def test_tune_means_vllm_where_vllm_alone_is_installed(vllm_alone: None) -> None:
    assert engine_of() == "vllm"


def test_tune_means_sglang_where_both_are_installed(
    vllm_alone: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sglang, "find", lambda: SglangInstallation("0.5.23", tmp_path, "3.7.1"))
    assert (engine_of(), engine_of("--engine", "vllm")) == ("sglang", "vllm")
    assert engine_choice.describe_choice(None) == "for SGLang: vLLM is installed here as well, and --engine chooses"


def test_tune_means_sglang_where_neither_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "find", lambda: None)
    monkeypatch.setattr(sglang, "find", lambda: None)
    assert engine_of() == "sglang"


def test_overlay_says_what_a_user_of_vllm_does_instead(vllm_alone: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["overlay"]) == 1
    assert "VLLM_TUNED_CONFIG_FOLDER" in capsys.readouterr().err


def test_a_store_that_cannot_be_written_is_named_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sglang_moe_ext.tables.files.is_writable", lambda folder: False)
    monkeypatch.setattr("sglang_moe_ext.tuning.pipeline.run", lambda *_: pytest.fail("work was begun"))
    assert main.main(["tune", *GIVEN, "--quiet"]) == 1
    assert "SGLANG_MOE_EXT_STORE" in capsys.readouterr().err


def test_the_help_states_every_exit_status() -> None:
    text = main.parser().format_help()
    assert all(f"{status:<4} {meaning}" in text for status, meaning in command.EXIT_STATUS.items())


@pytest.mark.parametrize("name", NAMES)
def test_the_help_shows_one_spelling_of_each_flag(name: str) -> None:
    text = subparsers()[name].format_help().partition("examples:")[0].partition("options:")[2]
    others = {long for _, action in flags() for long in [it for it in action.option_strings if len(it) > 2][1:]}
    assert others >= {"--tp", "-tp", "--tensor-parallel-size", "--save-dir"}
    assert not others & set(text.replace(",", " ").split())


@pytest.mark.parametrize("asking", [True, False])
def test_a_shell_is_answered_only_where_it_asks_for_completions(asking: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    answered: list[argparse.ArgumentParser] = []
    stand_in = types.ModuleType("argcomplete")
    stand_in.autocomplete = answered.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "argcomplete", stand_in)
    if asking:
        monkeypatch.setenv("_ARGCOMPLETE", "1")
    with pytest.raises(SystemExit):
        main.main(["--version"])
    assert [it.prog for it in answered] == (["sglang-moe-ext"] if asking else [])
