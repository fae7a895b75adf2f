"""Child of test_backends: asks the SGLang on PYTHONPATH which kernel runs experts whose weights alone are quantized.

stdin: {"marlin": [[hidden, columns, group], ...], "schemes": [{"section", "backend", "is_sm100"}, ...]}.
Last line of stdout: {"marlin": [true, ...], "schemes": [<name of the scheme's class, or of what is raised>, ...]}.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.moe.utils import MoeRunnerBackend
from sglang.srt.layers.quantization import marlin_utils
from sglang.srt.layers.quantization.compressed_tensors import compressed_tensors


class FusedMoE(torch.nn.Module):
    """Stands for a layer's experts: the engine looks at the name of the class."""


def marlin_takes(hidden: int, columns: int, group: int) -> bool:
    config = SimpleNamespace(apply_router_weight_on_input=False, activation="silu", is_gated=True)
    layer = SimpleNamespace(hidden_size=hidden, intermediate_size_per_partition=columns, moe_runner_config=config)
    return bool(marlin_utils.check_moe_marlin_supports_layer(layer, group))


def scheme(asked: dict[str, Any]) -> str:
    compressed_tensors.get_moe_runner_backend = lambda: MoeRunnerBackend(asked["backend"])
    if hasattr(compressed_tensors, "get_platform"):
        compressed_tensors.get_platform = lambda: SimpleNamespace(is_sm100=asked["is_sm100"])
    compressed_tensors._is_hip = False
    for name in ("CompressedTensorsWNA16MoE", "CompressedTensorsWNA16TritonMoE", "CompressedTensorsMxInt4MoE"):
        if hasattr(compressed_tensors, name):  # what they ask of a GPU is not asked here
            setattr(compressed_tensors, name, type(name, (), {"__init__": lambda self, *_, **__: None}))
    try:
        config = compressed_tensors.CompressedTensorsConfig.from_config(asked["section"])
        return type(config.get_moe_scheme(FusedMoE(), "model.layers.0.mlp.experts")).__name__
    except Exception as error:
        return type(error).__name__


if __name__ == "__main__":
    request = json.load(sys.stdin)
    marlin = [marlin_takes(*case) for case in request["marlin"]]
    print(json.dumps({"marlin": marlin, "schemes": [scheme(asked) for asked in request["schemes"]]}))
