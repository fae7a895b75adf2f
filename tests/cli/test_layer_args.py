"""What the flags of a layer print beside the layer: GPUs, notes on names and on memory."""

from __future__ import annotations

import argparse

import pytest

from sglang_moe_ext.cli import gpu_args, layer_args, layer_flags
from sglang_moe_ext.core import ModelError
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.gpu.names import find_gpu


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    layer_flags.add_to(made)
    layer_flags.add_engine_to(made)
    return made


def notes(capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    arguments = parser().parse_args(flags)
    layer = layer_args.parse_layer(arguments)
    gpu_args.print_memory_note(layer, find_gpu(arguments.gpu))
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]


def test_the_gpus_are_listed_in_the_form_that_the_flag_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["--list-gpus"])
    assert ended.value.code == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert {find_gpu(name).device_name for name in names} == set(specs.known_gpus())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--model", "GLM-4.7-Flash", "--gpu", "RTX_4090"), "take 53 GiB (46 layers of 1.1 GiB)"),
        (("--model", "Mixtral-8x7B", "--gpu", "L40S"), "take 84 GiB (32 layers of 2.6 GiB)"),
        (("--model", "Qwen3-30B-A3B-FP8", "--gpu", "RTX 4090"), "take 27 GiB"),
    ],
)
def test_a_model_that_cannot_fit_is_said_to(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    assert [note for note in notes(capsys, *flags) if said in note]


@pytest.mark.parametrize(
    "flags",
    [
        ("--model", "Qwen3-30B-A3B-FP8", "--gpu", "RTX 4090 48GB"),
        ("--model", "Qwen3-30B-A3B-FP8", "--gpu", "RTX 5090"),
        ("--model", "DeepSeek-V3", "--tp", "8", "--gpu", "H100"),
    ],
)
def test_a_model_whose_experts_fit_brings_no_note(capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]) -> None:
    assert notes(capsys, *flags) == []


def test_a_model_that_was_concluded_from_a_name_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    (note,) = notes(capsys, "--model", "unsloth/Qwen3-30B-A3B-Instruct-2507", "--gpu", "H200")
    assert "has the experts of the built-in Qwen3-30B-A3B by its name" in note


def test_a_built_in_name_brings_no_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert notes(capsys, "--model", "Qwen3-30B-A3B", "--gpu", "H200") == []


@pytest.mark.parametrize("flag", ["--dtype=fp8_w8a8", "--per-channel-quant", "--disable-shared-experts-fusion"])
def test_a_flag_that_a_tables_name_already_answers_is_refused(flag: str) -> None:
    with pytest.raises(ModelError, match="does not go with --from-log"):
        layer_args.parse_layer(parser().parse_args(["--from-log", "x", flag]))
