"""The ways into a process of SGLang or vLLM: what each of them calls. None of them raises."""

from __future__ import annotations

import logging
import sys
import time
from types import ModuleType

from sglang_moe_ext import __version__, env, import_hook

log = logging.getLogger(__name__)


def register_sglang() -> None:
    """Entry point of the group `sglang.srt.plugins` (SGLang 0.5.11 and newer)."""
    _attach_or_expect("the entry point", "sglang")


def register_vllm() -> None:
    """Entry point of the group `vllm.general_plugins`: each process calls it, before it knows its GPU."""
    _attach_or_expect("the entry point", "vllm")


def attach_patched() -> None:
    """What the line calls that `sglang-moe-ext patch --apply` puts at the end of the engine's layer module."""
    _attach_or_expect("a patch", "sglang")


def tune_before_loading(module: ModuleType) -> None:
    """Have the engine tune a layer before it loads a model, where that module has the function that loads one."""
    try:
        from sglang_moe_ext.serving import autotune
    except Exception as error:
        _say_off(error)
    else:
        autotune.hook_loading(module)


def _attach_or_expect(way: str, engine: str) -> None:
    if env.is_on(env.AUTOTUNE):
        _expect_loading(engine)
    try:
        modules = _layer_modules(engine)
    except Exception as error:  # an installation of ours that is broken is no reason for a server to end
        _say_off(error)
        return
    layer = next((sys.modules[name] for name in modules if name in sys.modules), None)
    if layer is not None:
        attach_engine(layer, way)
        return
    for name in modules:
        import_hook.on_import(name, lambda module: attach_engine(module, way))


def _expect_loading(engine: str) -> None:
    try:
        if engine == "vllm":
            from sglang_moe_ext.engines.vllm.model_loading import MODULE
        else:
            from sglang_moe_ext.engines.sglang.model_loading import MODULE
    except Exception as error:
        _say_off(error)
        return
    if MODULE in sys.modules:  # a scheduler imports it before it loads plugins
        tune_before_loading(sys.modules[MODULE])
    else:
        import_hook.on_import(MODULE, tune_before_loading)


def _layer_modules(engine: str) -> tuple[str, ...]:
    """Once one of them has been executed, all that we replace in that engine is there."""
    if engine == "vllm":
        from sglang_moe_ext.engines.vllm.installation import LAYER_MODULE

        return (LAYER_MODULE,)
    from sglang_moe_ext.engines.sglang.hook_points import LAYER_MODULES

    return LAYER_MODULES


def attach_engine(layer: ModuleType, way: str) -> None:
    """Hook the engine whose layer module this is, unless that has been done or is switched off."""
    started = time.perf_counter()
    try:
        from sglang_moe_ext.serving import attach
    except Exception as error:
        _say_off(error)
    else:
        attach.attach(layer, way, started)


def _say_off(error: Exception) -> None:
    log.warning("sglang-moe-ext %s is off, the engine runs as it is: %r", __version__, error)
