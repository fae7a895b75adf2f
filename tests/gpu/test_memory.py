"""Whether a model's experts fit into a GPU."""

from __future__ import annotations

from dataclasses import replace

from sglang_moe_ext.core import MoEShape, Quantization
from sglang_moe_ext.gpu import memory
from sglang_moe_ext.gpu.names import find_gpu

GLM_FLASH = MoEShape(65, 1536, 2048, 5)
FP8 = Quantization("fp8_w8a8", (128, 128))
RTX_4090 = find_gpu("RTX 4090")


def test_the_weights_of_one_layer_are_up_gate_and_down_of_each_expert() -> None:
    assert memory.expert_bytes(GLM_FLASH) == 65 * 3 * 1536 * 2048 * 2
    assert memory.expert_bytes(replace(GLM_FLASH, gated=False)) == 65 * 2 * 1536 * 2048 * 2
    assert memory.expert_bytes(replace(GLM_FLASH, quantization=FP8)) == 65 * 3 * 1536 * 2048


def test_a_model_that_is_larger_than_the_gpu_is_said_to_be() -> None:
    why = memory.why_too_large(GLM_FLASH, RTX_4090, 46)
    assert why is not None
    assert "take 53 GiB (46 layers of 1.1 GiB)" in why
    assert "NVIDIA GeForce RTX 4090 has 24 GiB" in why
    assert "\n" not in why


def test_a_model_that_fits_brings_no_note() -> None:
    qwen = MoEShape(128, 768, 2048, 8, FP8)
    assert memory.why_too_large(qwen, find_gpu("RTX 4090 48GB"), 48) is None


def test_without_a_number_of_layers_one_layer_is_counted() -> None:
    assert memory.why_too_large(GLM_FLASH, RTX_4090, None) is None
    huge = MoEShape(512, 8192, 8192, 8)
    assert "(one layer)" in (memory.why_too_large(huge, RTX_4090, None) or "")


def test_a_gpu_of_unknown_memory_brings_no_note() -> None:
    assert memory.why_too_large(GLM_FLASH, replace(RTX_4090, memory_gib=None), 46) is None
