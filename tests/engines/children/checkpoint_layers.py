"""Child of test_checkpoints: asks the SGLang on PYTHONPATH how it stores the experts of each layer of a checkpoint.

stdin: {name: {"section": <quantization_config>, "layers": [module of experts, ...]}}.
Last line of stdout: {name: [[scheme or null, bits, group], ...]}, or the class of what it raises as a text.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch


class FusedMoE(torch.nn.Module):
    """Stands for a layer's experts: the engine looks at the name of the class."""


def by_compressed_tensors(section: dict[str, Any], name: str) -> list[Any]:
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    config = CompressedTensorsConfig.from_config(section)
    config._add_fused_moe_to_target_scheme_map()
    found = [config.get_scheme_dict(FusedMoE(), f"{name}.0.{part}") for part in ("gate_proj", "up_proj", "down_proj")]
    if any(one != found[0] for one in found):
        return ["mixed", None, None]
    if found[0] is None:
        return [None, 16, None]
    weights = found[0]["weights"]
    return [str(getattr(weights.strategy, "value", weights.strategy)), weights.num_bits, weights.group_size]


def by_fp8(section: dict[str, Any], name: str) -> list[Any]:
    from sglang.srt.layers.quantization.fp8 import Fp8Config
    from sglang.srt.layers.quantization.utils import is_layer_skipped

    config = Fp8Config.from_config(section)
    return [None, 16, None] if is_layer_skipped(name, config.ignored_layers) else ["fp8", 8, None]


def by_awq(section: dict[str, Any], name: str) -> list[Any]:
    from sglang.srt.layers.quantization.awq.awq import is_layer_skipped_awq

    if is_layer_skipped_awq(name, section.get("modules_to_not_convert") or []):
        return [None, 16, None]
    return ["group", section["bits"], section["group_size"]]


def by_auto_round(section: dict[str, Any], name: str) -> list[Any]:
    from sglang.srt.layers.quantization.auto_round import AutoRoundConfig

    bits, group, _ = AutoRoundConfig.from_config(section).get_layer_config(FusedMoE(), name)
    return [None, 16, None] if bits >= 16 else ["group", bits, group]


def by_modelopt(section: dict[str, Any], name: str) -> list[Any]:
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp8Config

    config = ModelOptFp8Config(
        is_checkpoint_fp8_serialized=True,
        kv_cache_quant_method=None,
        exclude_modules=section.get("ignore") or section.get("exclude_modules"),
    )
    return [None, 16, None] if config.is_layer_excluded(name) else ["fp8", 8, None]


ASK = {
    "compressed-tensors": by_compressed_tensors,
    "fp8": by_fp8,
    "awq": by_awq,
    "auto-round": by_auto_round,
    "modelopt": by_modelopt,
}


def answer(asked: dict[str, Any]) -> list[Any] | str:
    section = asked["section"]
    try:
        return [ASK[section["quant_method"]](section, name) for name in asked["layers"]]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    print(json.dumps({name: answer(asked) for name, asked in json.load(sys.stdin).items()}))
