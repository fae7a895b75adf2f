"""A child that times the engine's table lookup, and what putting the hooks in takes; needs no GPU."""

from __future__ import annotations

import importlib
import time
import timeit
from typing import Any

from benchmarks.serving import attached
from benchmarks.serving.answering import answer_all, take_standard_output
from sglang_moe_ext.core import MoEShape
from sglang_moe_ext.engines.sglang import bootstrap
from sglang_moe_ext.engines.sglang.hook_points import LOOKUP

LAYERS = {
    "no table of the engine (GLM-4.7-Flash bf16)": MoEShape(65, 1536, 2048, 5),
    "a table of the engine (Qwen3-30B-A3B bf16)": MoEShape(128, 768, 2048, 8),
}
TOKENS = (1, 4096)
_CALLS, _REPEATS = 20_000, 7


class LookupChild:
    """Answers, by what is asked."""

    def __init__(self) -> None:
        self._said = attached.begin()
        self._look_up: Any = None

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Import the layer, as `pretend` (a device name) where there is no GPU; with `hooks`, see that they are in."""
        engine = attached.engine_here()
        layer = bootstrap.import_engine(engine.layer_module)
        bootstrap.publish_server_args()
        if not bootstrap.has_gpu():
            config: Any = importlib.import_module(engine.config_module)
            config.get_device_name = lambda *_: request["pretend"]
        if request["hooks"] and not attached.is_active(engine):
            plugin = importlib.import_module("sglang_moe_ext.serving.plugin")
            plugin.attach_patched()  # what an inserted line calls, where no startup file runs
        self._look_up = getattr(layer, LOOKUP)
        return {
            "active": attached.is_active(engine),
            "attached_ms": attached.attached_ms(),
            "device": layer_device(engine.config_module),
        }

    def time(self, _: dict[str, Any]) -> dict[str, Any]:
        """Microseconds a call by layer and what is returned: of the first for each of TOKENS, and once warm."""
        us: dict[str, dict[str, float]] = {}
        for name, shape in LAYERS.items():
            us[name] = {}
            for wants_down in (False, True):
                call = _call(self._look_up, shape, wants_down)
                begun = time.perf_counter()
                call()
                us[name][f"{_returned(wants_down)}, first"] = (time.perf_counter() - begun) / len(TOKENS) * 1e6
                best = min(timeit.repeat(call, number=_CALLS, repeat=_REPEATS))
                us[name][_returned(wants_down)] = best / _CALLS / len(TOKENS) * 1e6
        return {"us": us}

    def said(self, _: dict[str, Any]) -> dict[str, Any]:
        """What was logged of tables and hooks."""
        return {"lines": self._said.lines}


def layer_device(config_module: str) -> str:
    """The GPU that the engine believes in."""
    name = str(importlib.import_module(config_module).get_device_name())
    return name if bootstrap.has_gpu() else f"no GPU (the engine believes in {name})"


def _returned(wants_down: bool) -> str:
    return "both entries" if wants_down else "one entry"


def _call(look_up: Any, shape: MoEShape, wants_down: bool) -> Any:
    """One call for each of TOKENS, as the layer makes it."""
    w1 = (shape.experts, *shape.gemm("up"))
    w2 = (shape.experts, *shape.gemm("down"))

    def call() -> None:
        for tokens in TOKENS:
            look_up(
                w1,
                w2,
                shape.top_k,
                shape.quantization.scheme,
                tokens,
                block_shape=None,
                per_channel_quant=False,
                return_down_config=wants_down,
            )

    return call


def main() -> None:
    out = take_standard_output()
    child = LookupChild()
    answer_all(out, {"load": child.load, "time": child.time, "said": child.said})


if __name__ == "__main__":
    main()
