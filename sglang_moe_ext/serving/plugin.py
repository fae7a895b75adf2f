"""The ways into a process of SGLang or vLLM: what each of them calls. None of them raises."""

from __future__ import annotations

import logging
import sys
import time
from types import ModuleType

from sglang_moe_ext import __version__, arrivals

log = logging.getLogger(__name__)


def register_sglang() -> None:
    """Entry point of the group `sglang.srt.plugins` (SGLang 0.5.11 and newer)."""
    _attach_or_expect("the entry point")


def register_vllm() -> None:
    """Entry point of the group `vllm.general_plugins`; vLLM ends when one raises, and calls it repeatedly."""
    log.info("sglang-moe-ext %s is installed: vLLM reads its tables from where they were installed", __version__)


def attach_patched() -> None:
    """What the line calls that `sglang-moe-ext patch --apply` puts at the end of the engine's layer module."""
    _attach_or_expect("a patch")


def _attach_or_expect(way: str) -> None:
    try:
        from sglang_moe_ext.engines.sglang.targets import LAYER_MODULES
    except Exception as error:  # an installation of ours that is broken is no reason for a server to end
        _say_off(error)
        return
    layer = next((sys.modules[name] for name in LAYER_MODULES if name in sys.modules), None)
    if layer is not None:
        attach(layer, way)
        return
    for name in LAYER_MODULES:
        arrivals.expect(name, lambda module: attach(module, way))


def attach(layer: ModuleType, way: str) -> None:
    """Hook the engine whose layer module this is, unless that has been done or is switched off."""
    started = time.perf_counter()
    try:
        from sglang_moe_ext.serving import hooks
    except Exception as error:
        _say_off(error)
    else:
        hooks.attach(layer, way, started)


def _say_off(error: Exception) -> None:
    log.warning("sglang-moe-ext %s is off, the engine runs as it is: %r", __version__, error)
