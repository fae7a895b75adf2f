"""Inputs of public reports, as their authors would give them to the command line; each names its source."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.cli import layer_args, tune
from sglang_moe_ext.cli.layer_args import LayerArgs
from sglang_moe_ext.core import MoEExtError, Quantization
from sglang_moe_ext.engines.sglang import support as sglang
from sglang_moe_ext.engines.vllm import support as vllm
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.models import quantization_from_config

FP8_BLOCK, BY_CHANNEL = Quantization("fp8_w8a8", (128, 128)), Quantization("fp8_w8a8", per_channel=True)
OF_VLLM = (
    "Config file not found at /usr/local/lib/python3.12/dist-packages/vllm/model_executor/layers/fused_moe/configs/"
)
H20 = "E=512,N=128,device_name=NVIDIA_H20,dtype=fp8_w8a8,block_shape=[128, 128]"
QWEN: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 4,
}


def parsed(*flags: str) -> tuple[LayerArgs, argparse.Namespace]:
    parser = argparse.ArgumentParser()
    tune.add_to(parser)
    given = parser.parse_args(flags)
    return layer_args.parse_layer(given), given


Expected = tuple[int, int, int, int, Quantization]
REPORTS: dict[str, tuple[tuple[str, ...], Expected]] = {
    "vllm#17619: Qwen3-235B in eight ranks of whole experts": (
        (
            "--from-log",
            "(VllmWorker rank=1 pid=236) WARNING 05-03 17:42:23 [fused_moe.py:668] Using default MoE config. "
            f"Performance might be sub-optimal! {OF_VLLM}E=16,N=1536,device_name=NVIDIA_H100_80GB_HBM3,dtype=fp8_w8a8,"
            "block_shape=[128,128].json",
            "--model",
            "Qwen/Qwen3-235B-A22B-FP8",
        ),
        (16, 1536, 4096, 8, FP8_BLOCK),
    ),
    "vllm#17768: a terminal colour cut in half before the line": (
        (
            "--from-log",
            "> (VllmWorker rank=0 pid=281) [0;0m WARNING 05-15 11:07:08 [fused_moe.py:659] Using default MoE config. "
            f"Performance might be sub-optimal! {OF_VLLM}E=16,N=1024,device_name=NVIDIA_H200.json",
            "--model",
            "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        ),
        (16, 1024, 5120, 1, Quantization()),
    ),
    "sgl#5995: the id of a dynamic FP8 checkpoint": (
        ("--model", "RedHatAI/Qwen3-30B-A3B-FP8-dynamic"),
        (128, 768, 2048, 8, BY_CHANNEL),
    ),
    "sgl#28019: Gemma 4 in FP8 on a GB10": (
        ("--model", "RedHatAI/gemma-4-26B-A4B-it-FP8-Dynamic", "--gpu", "GB10"),
        (128, 704, 2816, 8, BY_CHANNEL),
    ),
    "Qwen3-Coder#461: eight H20e": (
        (
            *("--model", "Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8", "--engine", "vllm", "--tp", "8"),
            *("--enable-expert-parallel", "--gpu", "H20e"),
        ),
        (20, 2560, 6144, 8, FP8_BLOCK),
    ),
    "vllm#39183: MiniMax-M2.5 in four ranks of whole experts": (
        (
            *("--model", "MiniMaxAI/MiniMax-M2.5", "--engine", "vllm", "--tp", "4", "--enable-expert-parallel"),
            *("--gpu", "NVIDIA RTX PRO 6000 Blackwell Server Edition"),
        ),
        (64, 1536, 3072, 8, FP8_BLOCK),
    ),
    "vllm#36699: LFM2": (("--model", "LiquidAI/LFM2-8B-A1B", "--engine", "vllm"), (32, 1792, 2048, 4, Quantization())),
    "vllm#17604: AWQ that four ranks cut below Marlin's tile": (
        ("--model", "CognitiveComputations/Qwen3-30B-A3B-AWQ", "--engine", "vllm", "--tp", "4"),
        (128, 192, 2048, 8, Quantization("int4_w4a16", (0, 64))),
    ),
    "vllm#36954: GPTQ under --quantization moe_wna16": (
        ("--model", "Qwen3.5-122B-A10B-GPTQ-Int4", "--engine", "vllm", "--quantization", "moe_wna16"),
        (256, 1024, 3072, 8, Quantization("int4_w4a16", (0, 128))),
    ),
    "sgl#6000: AWQ under --quantization=awq_marlin": (
        ("--model", "swift/Qwen3-30B-A3B-AWQ", "--quantization", "awq_marlin"),
        (128, 768, 2048, 8, Quantization("int4_w4a16", (0, 128))),
    ),
    "sgl#33273: the lines about both GEMMs": (
        (
            "--from-log",
            f"Config file not found at .../{H20}.json\n    Config file not found at .../{H20}_down.json",
            "--model",
            "Qwen/Qwen3.5-397B-A17B-FP8",
        ),
        (512, 128, 4096, 10, FP8_BLOCK),
    ),
    "sgl#7687: DeepSeek-V3 in sixteen ranks": (
        ("--model", "deepseek-ai/DeepSeek-V3", "--tp", "16"),
        (257, 128, 7168, 9, FP8_BLOCK),
    ),
}


@pytest.mark.parametrize(("flags", "expected"), REPORTS.values(), ids=REPORTS.keys())
def test_a_report_is_understood(flags: tuple[str, ...], expected: Expected) -> None:
    found, given = parsed(*flags)
    shape = found.shape
    assert (shape.experts, shape.intermediate_size, shape.hidden_size, shape.top_k, shape.quantization) == expected
    if given.gpu:
        assert find_gpu(given.gpu).sm


def test_a_table_of_packed_weights_is_no_layer_of_a_known_model() -> None:  # vllm#14447
    with pytest.raises(MoEExtError, match=r"no built-in model asks for a table of E=256, N=14336"):
        parsed("--from-log", f"{OF_VLLM}E=256,N=14336,device_name=NVIDIA_GeForce_RTX_3090.json")


def test_a_rule_for_gates_does_not_leave_out_experts() -> None:  # GPTQModel#1680; SGLang takes GPTQMarlinMoEMethod
    stated = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "dynamic": {"-:.*.mlp.gate.*": {}}}
    assert quantization_from_config(QWEN | {"quantization_config": stated}) == Quantization("int4_w4a16", (0, 128))


def test_targets_that_name_experts_alone_are_read() -> None:  # llm-compressor#2163; SGLang 0.5.23 takes Triton's scheme
    weights = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}
    group = {"targets": ["re:.*mlp.experts.*.(down|gate|up)_proj$"], "weights": weights, "input_activations": None}
    stated = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    stated |= {"ignore": ["lm_head", "re:.*mlp.gate$"]}
    assert quantization_from_config(QWEN | {"quantization_config": stated}) == Quantization("int4_w4a16", (0, 32))


def test_no_flag_is_advised_that_the_checkpoint_does_not_take(
    tmp_path: Path,
) -> None:  # AutoRound, from a comment there
    stated = {"quant_method": "auto-round", "bits": 8, "group_size": 128, "sym": True}
    (tmp_path / "config.json").write_text(json.dumps(QWEN | {"quantization_config": stated}))
    found, _ = parsed("--model", str(tmp_path))
    for why in (
        sglang.why_no_table("auto", found.shape, find_gpu("H100"), found.architecture),
        vllm.why_no_table(found.shape, find_gpu("H100"), found.architecture),
    ):
        assert why is not None and "Marlin" in why and "moe_wna16" not in why


def test_weights_of_four_bits_by_channel_are_refused_for_what_they_are(tmp_path: Path) -> None:
    stated = {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True, "desc_act": False}
    (tmp_path / "config.json").write_text(json.dumps(QWEN | {"quantization_config": stated}))
    with pytest.raises(MoEExtError, match="one scale for each channel"):
        parsed("--model", str(tmp_path))


@pytest.mark.parametrize("flag", ["unquant", "MoE_WNA16", "awq-marlin"])
def test_a_flag_is_read_as_the_engine_spells_it(flag: str, tmp_path: Path) -> None:
    stated = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    (tmp_path / "config.json").write_text(json.dumps(QWEN | {"quantization_config": stated}))
    found, _ = parsed("--model", str(tmp_path), "--quantization", flag)
    assert found.shape.quantization == Quantization("int4_w4a16", (0, 128))


def test_a_flag_with_no_name_is_refused_in_words() -> None:
    with pytest.raises(MoEExtError, match="--quantization with no name is not known for SGLang"):
        parsed("--model", "Qwen3-30B-A3B", "--quantization", "")
