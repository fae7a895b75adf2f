"""Child of test_engine_contract: what the SGLang on PYTHONPATH says of its file names, signatures and tables.

stdin: {"names": [{"device", "experts", "n", "scheme", "block", "per_channel", "down"}], "lookups": {name: <request of
lookup_child.answer>}}. Last line of stdout: {"names": [...], "misfits": {function: error or null}, "lookups": {...}}.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from sglang_moe_ext.core import MoEShape, TileConfig
from sglang_moe_ext.engines.sglang import bootstrap, installation, lookup_probe, runner
from sglang_moe_ext.engines.sglang.installation import SglangInstallation
from sglang_moe_ext.engines.tensors import LayerTensors

CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}


def recorded(name: str, answer: Any) -> Callable[..., Any]:
    """In place of an engine's function: keeps the arguments that our code calls it with."""

    def record(*arguments: Any, **keywords: Any) -> Any:
        CALLS[name] = arguments, keywords
        return answer

    return record


def misfit(function: Callable[..., Any], name: str) -> str | None:
    """Why the engine's function would refuse our arguments, or None."""
    arguments, keywords = CALLS[name]
    try:
        inspect.signature(function).bind(*arguments, **keywords)
    except TypeError as error:
        return str(error)
    return None


def record_our_calls(engine: SglangInstallation, config: Any, lookup: dict[str, Any]) -> None:
    layer = SimpleNamespace(fused_experts_impl=recorded("fused_experts_impl", None), moe_sum_reduce=None)
    recorder = runner.LoadedSglang(
        engine.version,
        kernels=SimpleNamespace(invoke_fused_moe_kernel=recorded("invoke_fused_moe_kernel", None)),
        aligner=SimpleNamespace(moe_align_block_size=recorded("moe_align_block_size", (None, None, None))),
        layer=layer,
    )
    recorder.align(None, 16, 8)  # type: ignore[arg-type]
    tensors = runner.GemmTensors(*[None] * 9)  # type: ignore[arg-type]
    shape, tile = MoEShape(8, 64, 64, 2), TileConfig(16, 32, 64, 1, 4, 2)
    runner.launch(recorder, shape, "up", tensors, tile)
    runner.run(recorder, shape, LayerTensors(*[None] * 7), tile, tile)  # type: ignore[arg-type]
    real = config.try_get_optimal_moe_config
    config.try_get_optimal_moe_config = recorded("try_get_optimal_moe_config", ({}, (None, None)))
    lookup_probe.look_up(engine, config, lookup)
    config.try_get_optimal_moe_config = real


def file_name(config: Any, case: dict[str, Any]) -> str:
    config.get_device_name = lambda *_: case["device"]
    name = config.get_config_file_name(
        case["experts"],
        case["n"],
        case["scheme"],
        case["block"] or [0, 0],  # as get_moe_configs says it where there is none
        per_channel_quant=case["per_channel"],
        down_moe=case["down"],
    )
    return str(name)


def main(request: dict[str, Any]) -> dict[str, Any]:
    engine = installation.find()
    assert engine is not None
    config = bootstrap.import_engine(engine.config_module)
    functions = {
        "invoke_fused_moe_kernel": bootstrap.import_engine(engine.kernel_module).invoke_fused_moe_kernel,
        "moe_align_block_size": bootstrap.import_engine(engine.align_module).moe_align_block_size,
        "try_get_optimal_moe_config": config.try_get_optimal_moe_config,
        "fused_experts_impl": bootstrap.import_engine(engine.layer_module).fused_experts_impl,
    }
    record_our_calls(engine, config, next(iter(request["lookups"].values())))
    lookups = {}
    for name, lookup in request["lookups"].items():
        config.get_moe_configs.cache_clear()
        lookups[name] = lookup_probe.look_up(engine, config, lookup)
    return {
        "names": [file_name(config, case) for case in request["names"]],
        "misfits": {name: misfit(function, name) for name, function in functions.items()},
        "lookups": lookups,
    }


if __name__ == "__main__":
    print(json.dumps(main(json.load(sys.stdin))))
