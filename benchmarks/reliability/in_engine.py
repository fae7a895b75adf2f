"""Child: damaged tables behind the hooked lookup of the engine on PYTHONPATH. stdin: JSON; last line of stdout: Result.

{"engine", "count", "seed", "tables": [sound documents], "store"}. Each table is for a layer of its own, so that none is
answered from memory. The lookup must return an entry, raise nothing, and say short lines.
"""

from __future__ import annotations

import importlib
import json
import logging
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

from benchmarks.reliability.judged import Result
from benchmarks.reliability.mutations import mutate_json, text_of
from sglang_moe_ext.core import MoEShape
from sglang_moe_ext.engines.sglang import table_names as sglang_names
from sglang_moe_ext.engines.vllm import table_names as vllm_names
from sglang_moe_ext.serving import attach, plugin

DEVICE = "NVIDIA H200"
TOKENS = (1, 64, 4096)
_HIDDEN, _TOP_K = 2048, 8


class Lines(logging.Handler):
    """What a server's log would get."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def sglang_lookup() -> Callable[[MoEShape, int], object]:
    """The layer's lookup, hooked, as the engine's layer calls it."""
    from sglang_moe_ext.engines.sglang import bootstrap, installation

    found = installation.find()
    assert found is not None
    layer = bootstrap.import_engine(found.layer_module)
    bootstrap.publish_server_args()
    config: Any = importlib.import_module(found.config_module)
    config.get_device_name = lambda *_: DEVICE.replace(" ", "_")
    plugin.attach_patched()
    assert attach.state().is_active, attach.state()
    return lambda shape, m: layer.try_get_optimal_moe_config(*_weights(shape), _TOP_K, None, m, return_down_config=True)


def vllm_lookup() -> Callable[[MoEShape, int], object]:
    """The same of vLLM."""
    from sglang_moe_ext.engines.vllm import bootstrap

    plugin.register_vllm()
    layer = importlib.import_module("vllm.model_executor.layers.fused_moe.fused_moe")
    bootstrap.pretend(DEVICE, is_amd=False)
    assert attach.state("vllm").is_active, attach.state("vllm")
    return lambda shape, m: layer.try_get_optimal_moe_config(*_weights(shape), _TOP_K, None, m)


def _weights(shape: MoEShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    w1, w2 = (shape.experts, 2 * shape.intermediate_size, _HIDDEN), (shape.experts, _HIDDEN, shape.intermediate_size)
    return w1, w2


def main(asked: dict[str, Any]) -> Result:
    """Try `count` damaged tables."""
    chance, result, said = random.Random(asked["seed"]), Result(), Lines()
    logging.getLogger().addHandler(said)
    logging.getLogger("sglang_moe_ext").setLevel(logging.INFO)
    names = sglang_names if asked["engine"] == "sglang" else vllm_names
    look_up = (sglang_lookup if asked["engine"] == "sglang" else vllm_lookup)()
    folder = Path(asked["store"]) / "tables" / asked["engine"] / sglang_names.version_folder(triton.__version__)
    folder.mkdir(parents=True)
    for turn in range(asked["count"]):
        shape = MoEShape(8 + turn % 4000, 128 * (1 + turn // 4000), _HIDDEN, _TOP_K)
        path = folder / names.file_name(names.table_key(shape, DEVICE.replace(" ", "_")))
        content = text_of(mutate_json(chance.choice(asked["tables"]), chance), chance)
        path.write_bytes(content)
        begun, what = time.process_time(), f"table {turn}"
        result.tried += 1
        for tokens in TOKENS:
            try:
                answer = look_up(shape, tokens)
            except BaseException as error:  # noqa: BLE001 - that is the fault looked for
                result.faults.append(f"{what}, M={tokens}: {type(error).__name__}: {error}: {content[:200]!r}"[:500])
                break
            if not answer:
                result.faults.append(f"{what}, M={tokens}: answered {answer!r}")
        result.soon(what, begun)
        result.refused += any("your table" not in line and str(path.name) in line for line in said.lines)
        result.lines(what, said.lines)
        said.lines.clear()
        path.unlink()
    return result


if __name__ == "__main__":
    print(json.dumps(asdict(main(json.load(sys.stdin)))))
