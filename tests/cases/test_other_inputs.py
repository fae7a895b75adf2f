"""Other inputs of the kinds of public reports: what people type for GPUs and models, and sections of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.core import GpuError, MoEExtError
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.models import resolve


@pytest.mark.parametrize(
    ("typed", "device_name", "sm"),
    [
        ("rtx 5090 laptop", "NVIDIA GeForce RTX 5090 Laptop GPU", 120),
        ("RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 Laptop GPU", 89),
        ("5090", "NVIDIA GeForce RTX 5090", 120),
        ("4090", "NVIDIA GeForce RTX 4090", 89),
        ("DGX Spark", "NVIDIA GB10", 121),
        ("h20-3e", "NVIDIA H20-3e", 90),
        ("A800", "NVIDIA A800-SXM4-80GB", 80),
        ("GH200 480GB", "NVIDIA GH200 480GB", 90),
        ("MI300X", "AMD Instinct MI300X", 0),
    ],
)
def test_a_gpu_is_known_by_what_people_type(typed: str, device_name: str, sm: int) -> None:
    found = find_gpu(typed)
    assert (found.device_name, found.sm) == (device_name, sm)


@pytest.mark.parametrize("typed", ["Jetson Thor", "P100", "MI100", "Gaudi3"])
def test_a_gpu_that_is_not_supported_is_refused_by_its_name(typed: str) -> None:
    with pytest.raises(GpuError, match=f"GPU '{typed}' is not supported"):
        find_gpu(typed)


def test_a_name_of_two_gpus_is_refused_with_both() -> None:
    with pytest.raises(GpuError, match=r"may be NVIDIA_A100-SXM4-40GB or NVIDIA_A100-PCIE-40GB"):
        find_gpu("A100 40GB")


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("unsloth/Qwen3-30B-A3B-Instruct-2507", "not quantized"),
        ("Qwen/Qwen3-30B-A3B-Thinking-2507-FP8", "fp8_w8a8 block [128, 128]"),
        ("cpatonn/Qwen3-30B-A3B-AWQ-4bit", "int4_w4a16 group [0, 128]"),
        ("RedHatAI/Qwen3-30B-A3B-FP8-dynamic", "fp8_w8a8 per channel"),
        ("lmsys/gpt-oss-120b-bf16", "not quantized"),
    ],
)
def test_the_suffix_of_a_hub_id_tells_the_quantization(name: str, quantization: str) -> None:
    assert str(resolve(name).quantization) == quantization


@pytest.mark.parametrize(("name", "why"), [("nvidia/DeepSeek-R1-0528-FP4", "NVFP4"), ("openai/gpt-oss-20b", "MXFP4")])
def test_weights_that_no_table_is_for_are_refused_by_their_format(name: str, why: str) -> None:
    with pytest.raises(MoEExtError, match=rf"in {why}, .*no table is read"):
        resolve(name)


QWEN: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 4,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
}
FP8_CHANNEL: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
}
FP8_BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def in_folder(folder: Path, section: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps({**QWEN, "quantization_config": section}))
    return str(folder)


@pytest.mark.parametrize(
    ("section", "quantization"),
    [
        ({**FP8_CHANNEL, "ignore": ["re:.*experts.*"]}, "not quantized"),
        ({**FP8_CHANNEL, "ignore": ["lm_head"]}, "fp8_w8a8 per channel"),
        ({**FP8_BLOCK, "modules_to_not_convert": ["mlp"]}, "not quantized"),
        ({**FP8_BLOCK, "weight_block_size": [64, 64]}, "fp8_w8a8 block [64, 64]"),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True}, "int4_w4a16 group [0, 128]"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, "int4_w4a16 group [0, 32]"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, "int4_w4a16 group [0, 64]"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8_w8a8 per tensor"),
    ],
)
def test_a_section_says_what_the_experts_are(tmp_path: Path, section: dict[str, Any], quantization: str) -> None:
    assert str(resolve(in_folder(tmp_path, section)).quantization) == quantization


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ({"quant_method": "mxfp4"}, "mxfp4 do not run the Triton kernel"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "'NVFP4' do not run the Triton kernel"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes do not run the Triton kernel"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "3 bits, expected 4 or 8"),
        ({**FP8_BLOCK, "weight_block_size": "128,128"}, r"expected \[N, K\]"),
        ({"quant_method": "hqq"}, "unknown quant_method 'hqq'"),
    ],
)
def test_a_section_that_no_kernel_is_for_is_refused_with_its_reason(
    tmp_path: Path, section: dict[str, Any], why: str
) -> None:
    with pytest.raises(MoEExtError, match=why):
        resolve(in_folder(tmp_path, section))
