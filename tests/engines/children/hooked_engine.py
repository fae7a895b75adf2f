"""Child of test_hooks: the SGLang on PYTHONPATH with our hooks in, and then without, by each way that they come in.

stdin: {"packaging": folder of the startup file, "site": folder that holds our entry points, "device": name}, or
{"packaging", "tile", "limit": bytes a block} to launch in Triton's interpreter. Last line of stdout: what `main` or
`launched` returns.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import site
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from sglang_moe_ext import env
from sglang_moe_ext.core import MoEShape, Quantization
from sglang_moe_ext.engines import running_engine
from sglang_moe_ext.engines.sglang import bootstrap, hook_points, installation, runner
from sglang_moe_ext.serving import attach, guard, plugin

SHAPES = {
    "bf16": MoEShape(12, 320, 512, 3),
    "fp8-block": MoEShape(12, 256, 512, 3, Quantization("fp8_w8a8", (128, 128))),
    "fp8-channel": MoEShape(12, 320, 512, 3, Quantization("fp8_w8a8", per_channel=True)),
    "int8-channel": MoEShape(12, 320, 512, 3, Quantization("int8_w8a8", per_channel=True)),
    "int4": MoEShape(12, 320, 512, 3, Quantization("int4_w4a16", (0, 128))),
    "no table": MoEShape(13, 320, 512, 3),
}
TOKENS = 64
OVERRIDE = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 16, "BLOCK_SIZE_K": 16, "GROUP_SIZE_M": 3}
NAMES = (hook_points.LOOKUP, hook_points.LAUNCH)
LINES: list[str] = []


class Remembers(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        LINES.append(record.getMessage())


class Engine:
    """The engine's modules, and its own two functions."""

    def __init__(self, layer: ModuleType) -> None:
        found = installation.find()
        assert found is not None
        self.layer, self.version = layer, found.version
        self.config, self.kernels = sys.modules[found.config_module], sys.modules[found.kernel_module]
        self.package = sys.modules[layer.__name__.rpartition(".")[0]]
        self.own = {name: getattr(layer, name) for name in NAMES}

    def put_back(self) -> None:
        """Take our functions out, as if this process had never been hooked."""
        for name in NAMES:
            running_engine.replace("sglang", getattr(self.layer, name), self.own[name])
        attach._states.clear()
        guard.warn_once.cache_clear()
        LINES.clear()

    def ask(self, name: str, tokens: int = TOKENS, *, down: bool = True, own: bool = False) -> Any:
        """What the function says that the layer calls, or the engine's own behind it."""
        shape, function = SHAPES[name], getattr(self.layer, hook_points.LOOKUP)
        columns = shape.intermediate_size // (2 if name == "int4" else 1)
        hidden = shape.hidden_size // (2 if name == "int4" else 1)
        block = shape.quantization.block_shape
        named: dict[str, Any] = {"return_down_config": True} if down else {}
        if self.version > (0, 5, 5):  # which reads the same table for scales per channel and per tensor
            named["per_channel_quant"] = shape.quantization.per_channel
        return (function.__wrapped__ if own else function)(
            (shape.experts, 2 * shape.intermediate_size, hidden),
            (shape.experts, shape.hidden_size, columns),
            shape.top_k,
            shape.quantization.scheme,
            tokens,
            block_shape=None if block is None else list(block),
            **named,
        )


def holders() -> dict[str, list[str]]:
    """The modules of the engine that hold each of the two names, with * where the function is ours."""
    return {
        name: [
            module_name + ("*" if hasattr(getattr(module, name), "__wrapped__") else "")
            for module_name, module in sorted(sys.modules.items())
            if module_name.startswith("sglang.") and name in vars(module)
        ]
        for name in NAMES
    }


def tma(engine: Engine) -> dict[str, Any]:
    """By scheme (whether up has TMA, whether down has it, lines that say it is off), of two numbers of tokens."""
    said = {}
    for name in SHAPES:
        LINES.clear()
        for tokens in (TOKENS, TOKENS + 1):
            up, (down, _) = engine.ask(name, tokens)
        off = [line for line in LINES if "USE_TMA" in line]
        said[name] = [up.get("USE_TMA", False), bool(down) and down.get("USE_TMA", False), off]
    return said


def is_fresh(engine: Engine) -> bool:
    """Whether an answer stays what it was when the one before it was changed, as the engine changes it."""
    first = engine.ask("bf16")
    expected = json.dumps(first)
    first[0].clear()
    first[1][0].pop("USE_TMA", None)
    first[1][0]["BLOCK_SIZE_M"] = 1
    return json.dumps(engine.ask("bf16")) == expected


def overridden(engine: Engine) -> list[Any]:
    """What both shapes of the call return inside the engine's override, and after it."""
    with engine.package.override_config(OVERRIDE):
        inside = [engine.ask("bf16"), engine.ask("bf16", down=False)]
        own = [engine.ask("bf16", own=True), engine.ask("bf16", down=False, own=True)]
    return [inside == own and inside[1] == OVERRIDE, engine.ask("bf16")]


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    yield
    del os.environ[name]


def state_by(engine: Engine, way: Callable[[], object]) -> list[Any]:
    """(active, why, lines) of a process that comes to be hooked this way."""
    engine.put_back()
    way()
    state = attach.state()
    return [state.is_active, state.why, list(LINES)]


def kept_out(engine: Engine, name: str, value: str) -> bool:
    with variable(name, value):
        state_by(engine, plugin.attach_patched)
    return all(getattr(engine.layer, name) is own for name, own in engine.own.items())


def moved(engine: Engine, module: ModuleType, name: str, function: object) -> list[Any]:
    """(nothing is replaced, active, lines) where something else, or nothing, stands at a name of the engine."""
    engine.put_back()
    before = getattr(module, name)
    delattr(module, name)
    if function is not None:
        setattr(module, name, function)
    bound = {(at, key): value for at, it in all_modules() for key, value in vars(it).items() if key in NAMES}
    for _ in range(2):
        plugin.register_sglang()
    untouched = all(getattr(sys.modules[at], key) is value for (at, key), value in bound.items())
    setattr(module, name, before)
    return [untouched, attach.state().is_active, list(LINES)]


def all_modules() -> list[tuple[str, ModuleType]]:
    return [(name, module) for name, module in sys.modules.items() if name.startswith("sglang.")]


def by_load_plugins(engine: Engine, folder: str) -> list[Any] | None:
    """The real loader of entry points, None up to 0.5.10, which has none."""
    try:
        plugins = importlib.import_module("sglang.srt.plugins")
    except ModuleNotFoundError:
        return None
    sys.path.append(folder)
    plugins._plugins_loaded = False
    return state_by(engine, plugins.load_plugins)


def deterministic(engine: Engine) -> bool:
    """Whether a server that promises the same results whatever the batch runs the engine's own choice."""
    state_by(engine, plugin.attach_patched)
    bootstrap.publish_server_args(deterministic=True)
    engine.config.get_moe_configs.cache_clear()
    answer = engine.ask("bf16") == engine.ask("bf16", own=True)
    bootstrap.publish_server_args()
    engine.config.get_moe_configs.cache_clear()
    return bool(answer)


def imported(packaging: str) -> Engine:
    """The engine, imported by a process that has read our startup file."""
    logging.getLogger("sglang_moe_ext").addHandler(Remembers())
    logging.getLogger("sglang_moe_ext").setLevel(logging.INFO)
    site.addsitedir(packaging)
    found = installation.find()
    assert found is not None
    layer = importlib.import_module(found.layer_module)
    engine = Engine(layer)
    for name in NAMES:
        engine.own[name] = getattr(engine.own[name], "__wrapped__", None)
    return engine


def main(request: dict[str, Any]) -> dict[str, Any]:
    engine = imported(request["packaging"])
    importlib.import_module("sglang.srt.layers.moe.moe_runner.triton")
    started = attach.state()
    bootstrap.publish_server_args()
    engine.config.get_device_name = lambda *_: request["device"]
    engine.config._get_cuda_shared_memory_per_block_optin = lambda: 232448
    held = holders()
    said: dict[str, Any] = {
        "ways": {"startup": [started.is_active, started.why, list(LINES)]},
        "holders": held,
        "pair": engine.ask("bf16"),
        "first_lines": list(LINES),
        "up_only": engine.ask("bf16", down=False),
        "tma": tma(engine),
        "is_fresh": is_fresh(engine),
        "override": overridden(engine),
        "no_table": engine.ask("no table") == engine.ask("no table", own=True),
    }
    plugin.register_sglang()
    plugin.attach_patched()
    said["wrapped_once"] = [holders() == held, not hasattr(engine.own[hook_points.LOOKUP], "__wrapped__")]
    said["ways"]["entry point"] = state_by(engine, plugin.register_sglang)
    said["ways"]["patch"] = state_by(engine, plugin.attach_patched)
    said["ways"]["load_plugins"] = by_load_plugins(engine, request["site"])
    said["deterministic"] = deterministic(engine)
    said["kept_out"] = {
        env.DISABLE: kept_out(engine, env.DISABLE, "1"),
        "SGLANG_PLUGINS": kept_out(engine, "SGLANG_PLUGINS", "another"),
    }
    said["let_in"] = not kept_out(engine, "SGLANG_PLUGINS", "another, sglang_moe_ext")
    said["moved"] = {
        "the lookup is gone": moved(engine, engine.config, hook_points.LOOKUP, None),
        "the launcher is gone": moved(engine, engine.kernels, hook_points.LAUNCH, None),
        "the lookup takes other arguments": moved(engine, engine.config, hook_points.LOOKUP, lambda shape: shape),
        "the launcher takes other arguments": moved(engine, engine.kernels, hook_points.LAUNCH, lambda a, b: a),
        "the default takes other arguments": moved(engine, engine.config, "get_default_config", lambda m: m),
        "the layer uses another launcher": moved(engine, engine.layer, hook_points.LAUNCH, lambda a, b: a),
    }
    return said


class Refusing:
    """In the place of the engine's kernel: refuses, with Triton's own error, what asks for more than a limit."""

    def __init__(self, kernel: Any, limit: int) -> None:
        self.kernel, self.limit, self.asked = kernel, limit, []

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*arguments: Any, **named: Any) -> Any:
            from triton.runtime.errors import OutOfResources

            tile = {name: named[name] for name in ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "num_stages")}
            rows, columns, depth, stages = tile.values()
            self.asked.append(asked := 2 * (rows + columns) * depth * (stages - 1))
            if asked > self.limit:
                raise OutOfResources(asked, self.limit, "shared memory")
            return self.kernel[grid](*arguments, **named)

        return launch


def launched(request: dict[str, Any]) -> dict[str, Any]:
    """Relative error of each of two launches against the reference, and what each asked the GPU for, in bytes."""
    from tests.engines.children import dtypes
    from tests.kernels.interpreter import repair

    repair()
    imported(request["packaging"])
    engine = runner.load()
    refusing = engine.kernels.fused_moe_kernel = Refusing(engine.kernels.fused_moe_kernel, request["limit"])
    shape = dataclasses.asdict(MoEShape(4, 64, 128, 2))
    case = {"shape": shape, "projection": "up", "tile": request["tile"], "change": ""}
    said: dict[str, Any] = {"errors": [], "asked": [], "lines": LINES}
    for _ in range(2):
        refusing.asked = []
        said["errors"].append(dtypes.error_of(engine, case))
        said["asked"].append(refusing.asked)
    return said


if __name__ == "__main__":
    asked_for = json.load(sys.stdin)
    print(json.dumps(launched(asked_for) if "tile" in asked_for else main(asked_for)))
