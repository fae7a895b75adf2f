"""Lines about a missing table as people paste them, with the layer that the server had (public reports)."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_moe_ext.cli import doctor_layers, layer_args, layer_flags
from sglang_moe_ext.cli.layer_args import LayerArgs
from sglang_moe_ext.core import ModelError, MoEExtError, MoEModel, MoEShape, Parallelism, Quantization, TableError
from sglang_moe_ext.engines.sglang import installation, sharding
from sglang_moe_ext.engines.sglang import table_names as sglang_names
from sglang_moe_ext.engines.vllm import installation as vllm_installation
from sglang_moe_ext.engines.vllm import sharding as vllm_sharding
from sglang_moe_ext.engines.vllm import table_names as vllm_names
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.models.builtin import builtin_records

DATA = Path(__file__).resolve().parents[1] / "data" / "cases"
BLOCK_FP8 = Quantization("fp8_w8a8", (128, 128))
H100 = "NVIDIA_H100_80GB_HBM3"


@pytest.fixture(autouse=True)
def newest_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "find", lambda: None)
    monkeypatch.setattr(vllm_installation, "find", lambda: None)
    monkeypatch.setattr(specs, "detect", lambda: None)


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    layer_flags.add_to(parser)
    layer_flags.add_engine_to(parser)
    return parser.parse_args(flags)


def parsed(*flags: str) -> LayerArgs:
    return layer_args.parse_layer(arguments(*flags))


def asked(capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    """The commands that are printed where the flags do not settle the layer."""
    with pytest.raises(ModelError, match="run one of the commands above"):
        parsed(*flags)
    return ready_commands(capsys.readouterr().out)


def ready_commands(printed: str) -> list[str]:
    lines = [line for line in printed.splitlines() if line.startswith("  sglang-moe-ext tune")]
    return [line.strip().partition("  #")[0] for line in lines]


def of_command(command: str) -> LayerArgs:
    return parsed(*shlex.split(command)[2:])


def text(name: str) -> str:
    return (DATA / name).read_text(encoding="utf-8")


def layer(shape: MoEShape) -> tuple[int, int, int, int, Quantization]:
    return shape.experts, shape.intermediate_size, shape.hidden_size, shape.top_k, shape.quantization


KIMI_VL = (16, 1408, 2048, 6, Quantization())


def test_a_name_that_only_unusual_launches_ask_for_is_asked_back_with_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands = asked(capsys, "--from-log", text("line_of_kimi_vl.txt"))

    assert KIMI_VL in [layer(of_command(command).shape) for command in commands[:-1]]
    assert "--model GLM-4.5-Air --tp-size 8 --ep-size 8" in "\n".join(commands)
    assert commands[-1] == "sglang-moe-ext tune --shape E=16,N=1408,K=...,topk=..."


def test_the_config_beside_the_line_settles_the_layer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text("kimi_vl_config.json"))
    found = parsed("--from-log", text("line_of_kimi_vl.txt"), "--model", str(tmp_path))

    assert layer(found.shape) == KIMI_VL
    assert found.device_name == "NVIDIA H100 80GB HBM3"
    assert "at --tp-size 4 --ep-size 4" in found.notes[0]


DEEPSEEK_16 = (257, 128, 7168, 9, BLOCK_FP8)


def test_several_models_are_ranked_by_their_own_quantization_and_printed_as_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands = asked(capsys, "--from-log", text("line_under_mpirun.txt"))

    assert commands[0] == f"sglang-moe-ext tune --model DeepSeek-R1 --tp-size 16 --gpu {H100}"
    assert layer(of_command(commands[0]).shape) == DEEPSEEK_16
    assert commands[1] == f"sglang-moe-ext tune --model GLM-5-FP8 --tp-size 16 --gpu {H100}"


def test_models_with_the_same_table_are_one_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError):
        parsed("--from-log", text("line_under_mpirun.txt"))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "DeepSeek-R1" in line)
    assert line.endswith("  # the same for DeepSeek-V3, DeepSeek-V3.1")


def test_models_with_the_same_table_and_no_rival_need_no_question(capsys: pytest.CaptureFixture[str]) -> None:
    line = "Config file not found at /s/sglang/configs/triton_3_5_1/E=161,N=1536,device_name=NVIDIA_B200.json"
    found = parsed("--from-log", line)

    assert layer(found.shape) == (161, 1536, 5120, 9, Quantization())
    assert "a guess: GLM-4.5, GLM-4.6, GLM-4.7 ask for this table at --tp-size 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "beside", [("--model", "DeepSeek-R1"), ("--model", "deepseek-ai/DeepSeek-V3-0324", "--tp-size", "16")]
)
def test_a_model_beside_the_line_settles_it(beside: tuple[str, ...]) -> None:
    assert layer(parsed("--from-log", text("line_under_mpirun.txt"), *beside).shape) == DEEPSEEK_16


def test_flags_that_no_launch_of_the_model_agrees_with_are_refused() -> None:
    with pytest.raises(ModelError, match=r"no launch of DeepSeek-R1 with these flags asks for E=257,N=128"):
        parsed("--from-log", text("line_under_mpirun.txt"), "--model", "DeepSeek-R1", "--tp-size", "8")


QWEN3_NEXT = (513, 512, 2048, 11, BLOCK_FP8)


def test_a_line_that_broke_within_the_name_is_read() -> None:
    found = parsed("--from-log", text("line_wrapped.txt"))

    assert (found.name, layer(found.shape)) == ("Qwen3-Next-80B-A3B", QWEN3_NEXT)


@pytest.mark.parametrize("at", range(0, 280, 7))
def test_a_line_may_break_anywhere(at: int) -> None:
    line = text("line_wrapped.txt").replace("[128,\n128]", "[128, 128]").strip()
    broken = f"> {line[:at]}\n> {line[at:]}"

    assert layer(parsed("--from-log", broken).shape) == QWEN3_NEXT


CODER_480B = (160, 2560, 6144, 8, BLOCK_FP8)


@pytest.mark.parametrize("beside", [(), ("--engine", "vllm")], ids=["", "with --engine"])
def test_a_line_of_vllm_is_a_table_of_vllm(beside: tuple[str, ...]) -> None:
    given = arguments("--from-log", text("line_of_vllm.txt"), *beside)
    found = layer_args.parse_layer(given)

    assert given.engine == "vllm"
    assert layer(found.shape) == CODER_480B
    assert found.vllm_shape == found.shape
    assert found.line_engine == "vllm"


def test_doctor_looks_at_the_engine_of_the_line_alone(capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments("--from-log", text("line_of_vllm.txt"), "--gpu", "H200")
    found = layer_args.parse_layer(given)

    assert doctor_layers.from_flags(given, found, "sglang") is None
    under_test = doctor_layers.from_flags(given, found, "vllm")
    assert under_test is not None
    assert layer(under_test.shape) == CODER_480B


def test_an_engine_that_contradicts_the_line_is_taken_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments("--from-log", text("line_of_vllm.txt"), "--engine", "sglang")
    layer_args.parse_layer(given)

    assert given.engine == "sglang"
    assert "the line is vLLM's, and is read as SGLang's because --engine says so" in capsys.readouterr().out


@pytest.mark.parametrize("given", [text("server.log"), str(DATA / "server.log")], ids=["pasted", "by its name"])
def test_of_a_whole_log_the_table_that_was_not_found_counts(given: str) -> None:
    found = parsed("--from-log", given)

    assert (found.name, layer(found.shape)) == ("GLM-4.7-Flash", (65, 1536, 2048, 5, Quantization()))
    assert "the log's own launch line says GLM-4.7-Flash" in found.notes[0]


def test_a_log_in_which_every_table_was_found_is_said_to_be_one() -> None:
    line = "Using MoE kernel config from /x/configs/triton_3_7_1/E=128,N=768,device_name=NVIDIA_H200.json."
    with pytest.raises(TableError, match=r"says that E=128,N=768.* was found"):
        parsed("--from-log", line)


def test_redundant_experts_are_split_with_the_others() -> None:
    launch = shlex.split(text("launch_with_redundant_experts.txt"))
    assert launch[-2:] == ["--ep-num-redundant-experts", "32"]
    found = parsed("--model", "DeepSeek-R1", "--tp", "8", "--ep", "8", *launch[-2:])

    assert (found.shape.experts, found.shape.intermediate_size, found.shape.top_k) == (36, 2048, 8)


def test_redundant_experts_in_the_launch_line_of_a_log_are_used() -> None:
    line = "Config file not found at /sglang/configs/triton_3_5_1/E=36,N=2048,device_name=NVIDIA_H200,dtype=fp8_w8a8,"
    found = parsed("--from-log", text("launch_with_redundant_experts.txt") + line + "block_shape=[128, 128].json")

    assert layer(found.shape) == (36, 2048, 7168, 8, BLOCK_FP8)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--ep-num-redundant-experts", "32"), "beside an --ep-size above 1"),
        (("--tp", "8", "--ep", "8", "--ep-num-redundant-experts", "3"), "does not divide"),
    ],
)
def test_redundant_experts_that_cannot_be_split_are_refused(flags: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        parsed("--model", "DeepSeek-R1", *flags)


# Further inputs of the same kinds, written before they were tried.
FURTHER: dict[str, tuple[tuple[str, ...], str, tuple[int, int, int, int, Quantization]]] = {
    "markdown quote with escaped underscores, in backticks": (
        (
            "> `[2026-01-03 10:00:00 TP0] Using default MoE kernel config. Performance might be sub-optimal! Config\n"
            "> file not found at /sgl-workspace/sglang/python/sglang/srt/layers/moe/fused\\_moe\\_triton/configs/\n"
            "> triton\\_3\\_4\\_0/E=161,N=192,device\\_name=NVIDIA\\_H200.json, you can create them`",
        ),
        "sglang",
        (161, 192, 5120, 9, Quantization()),
    ),
    "terminal colours and a box around": (
        (
            "│ \x1b[33mWARNING\x1b[0m Config file not found at /usr/lib/python3/site-packages/vllm/model_executor/ │\n"
            "│ layers/fused_moe/configs/E=128,N=2880,device_name=NVIDIA_B200.json                        │\n",
        ),
        "vllm",
        (128, 2880, 2880, 4, Quantization()),
    ),
    "a worker of vLLM with a tuned folder: two paths, ranks up to 3": (
        (
            "(Worker_TP3 pid=99) WARNING 05-05 01:01:01 [fused_moe.py:1166] Using default MoE"
            " config. Performance might "
            "be sub-optimal! Config file not found at /data/tuned/E=64,N=352,device_name=NVID"
            "IA_H200.json, /opt/venv/lib/"
            "python3.12/site-packages/vllm/model_executor/layers/fused_moe/configs/E=64,N=352"
            ",device_name=NVIDIA_H200.json",
            "--model",
            "moonshotai/Moonlight-16B-A3B-Instruct",
        ),
        "vllm",
        (64, 352, 2048, 6, Quantization()),
    ),
    "SGLang's line about the down projection alone": (
        (
            "Down MoE config file not found at /x/sglang/srt/layers/moe/moe_runner/triton_uti"
            "ls/configs/triton_3_6_0/E=65,"
            f"N=768,device_name={H100}_down.json; reusing the tuned up-projection config without TMA.",
        ),
        "sglang",
        (65, 768, 2048, 5, Quantization()),
    ),
    "a fallback: the second name was found": (
        (
            "[2025-11-01 12:00:00 TP7 EP7] Config file not found at /s/sglang/configs/triton_"
            "3_5_1/E=32,N=768,device_name="
            "NVIDIA_H20.json. Fallback to triton version 3.4.0 and use MoE kernel config from /s/sglang/configs/"
            "triton_3_4_0/E=128,N=192,device_name=NVIDIA_H20.json. Performance might be sub-optimal!",
            "--model",
            "Qwen/Qwen3-30B-A3B-Instruct-2507",
        ),
        "sglang",
        (32, 768, 2048, 8, Quantization()),
    ),
    "the launch command and the line, on two lines": (
        (
            "$ vllm serve Qwen/Qwen3-235B-A22B-Instruct-2507-FP8 --tensor-parallel-size 4 --enable-expert-parallel\n"
            "Using default MoE config. Performance might be sub-optimal! Config file not foun"
            "d at /v/vllm/model_executor/"
            "layers/fused_moe/configs/E=32,N=1536,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json",
        ),
        "vllm",
        (32, 1536, 4096, 8, BLOCK_FP8),
    ),
    "a name alone, spelt as vLLM does": (
        ("E=256,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json", "--model", "DeepSeek-V3"),
        "vllm",
        (256, 256, 7168, 8, BLOCK_FP8),
    ),
    "a server with --disable-shared-experts-fusion": (
        (
            f"Config file not found at /s/sglang/configs/triton_3_5_1/E=256,N=256,device_name={H100},dtype=fp8_w8a8,"
            "block_shape=[128, 128].json",
            "--model",
            "DeepSeek-R1-0528",
        ),
        "sglang",
        (256, 256, 7168, 8, BLOCK_FP8),
    ),
    "weights that the server quantizes itself": (
        (
            "Config file not found at /s/sglang/configs/triton_3_5_1/E=8,N=7168,device_name=N"
            "VIDIA_L40S,dtype=fp8_w8a8.json",
            "--tp-size",
            "2",
        ),
        "sglang",
        (8, 7168, 4096, 2, Quantization("fp8_w8a8")),
    ),
    "int4, whose N is packed in SGLang's name": (
        (
            "Config file not found at /s/sglang/configs/triton_3_6_0/E=128,N=96,device_name=NVIDIA_A100-SXM4-80GB,"
            "dtype=int4_w4a16.json",
            "--model",
            "Qwen/Qwen3-30B-A3B-GPTQ-Int4",
        ),
        "sglang",
        (128, 192, 2048, 8, Quantization("int4_w4a16", (0, 128))),
    ),
    "an http address instead of a path, with the space as %20": (
        (
            "not found at file:///srv/sglang/srt/layers/moe/moe_runner/triton_utils/configs/triton_3_7_1/E=513,N=512,"
            "device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,%20128].json",
        ),
        "sglang",
        QWEN3_NEXT,
    ),
}


@pytest.mark.parametrize(("flags", "engine", "expected"), FURTHER.values(), ids=FURTHER.keys())
def test_further_pastes_are_read(
    flags: tuple[str, ...], engine: str, expected: tuple[int, int, int, int, Quantization]
) -> None:
    given = arguments("--from-log", *flags)

    assert layer(layer_args.parse_layer(given).shape) == expected
    assert given.engine == engine


def sglang_line(model: MoEModel, parallelism: Parallelism) -> tuple[str, MoEShape]:
    shape = sharding.launched_shape(model, parallelism)
    name = sglang_names.file_name(sglang_names.table_key(shape, H100))
    return f"Config file not found at /s/sglang/srt/layers/moe/configs/triton_3_5_1/{name}, you can create", shape


def vllm_line(model: MoEModel, parallelism: Parallelism) -> tuple[str, MoEShape]:
    shape = vllm_sharding.launched_shape(model, parallelism)
    name = vllm_names.file_name(vllm_names.table_key(shape, H100))
    return f"Config file not found at /v/vllm/model_executor/layers/fused_moe/configs/{name}", shape


@pytest.mark.parametrize(("engine", "line"), [("sglang", sglang_line), ("vllm", vllm_line)])
def test_no_line_of_a_built_in_model_ends_without_a_ready_command(
    engine: str,
    line: Callable[[MoEModel, Parallelism], tuple[str, MoEShape]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tried = 0
    for record in builtin_records():
        for tp in (1, 2, 4, 8):
            try:
                pasted, shape = line(record.model, Parallelism(tp))
            except ModelError:
                continue  # the engine refuses that split
            if engine not in record.engines:
                continue
            tried += 1
            capsys.readouterr()
            try:
                found = [parsed("--from-log", pasted)]
            except MoEExtError:
                commands = ready_commands(capsys.readouterr().out)
                found = [of_command(command) for command in commands if "..." not in command]
            assert layer(shape) in [layer(it.shape) for it in found], (record.model.name, tp)
            # and with the model named, nothing is left to ask
            assert layer(parsed("--from-log", pasted, "--model", record.model.name).shape) == layer(shape)
    assert tried > 204


def test_the_config_of_the_case_is_the_one_of_the_built_in_model() -> None:
    stated = json.loads(text("kimi_vl_config.json"))["text_config"]
    known = next(it.model for it in builtin_records() if it.model.name == "Kimi-VL-A3B")

    assert (known.routed_experts, known.top_k, known.hidden_size, known.intermediate_size) == (
        stated["n_routed_experts"],
        stated["num_experts_per_tok"],
        stated["hidden_size"],
        stated["moe_intermediate_size"],
    )
