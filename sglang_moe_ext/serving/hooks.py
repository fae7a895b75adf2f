"""Put our functions into the place of the engine's: all of them or none, once a process, and never with an error."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from sglang_moe_ext import SWITCH, __version__
from sglang_moe_ext.engines.asked import Layer
from sglang_moe_ext.engines.sglang import targets
from sglang_moe_ext.engines.sglang.targets import Targets
from sglang_moe_ext.serving import launch, lookup
from sglang_moe_ext.serving.guard import warn_once
from sglang_moe_ext.serving.overlay import Choice
from sglang_moe_ext.serving.places import places

log = logging.getLogger(__name__)

_PLUGINS = "SGLANG_PLUGINS"
CAPTURE = "SGLANG_MOE_EXT_CAPTURE"
_OUR_NAME = "sglang_moe_ext"


@dataclass(frozen=True, slots=True)
class State:
    """What became of a process: the way that our functions came in, or why they did not, and milliseconds of that."""

    is_active: bool
    why: str
    ms: float = 0.0


_resolver: lookup.Resolver | None = None
_state = State(False, "the engine's layer has not been imported")


def state() -> State:
    """Of this process."""
    return _state


def choices(layer: Layer, tokens: Sequence[int]) -> dict[int, Choice]:
    """What this process takes at each M, and why; empty where our functions are not in place."""
    return {} if _resolver is None else {m: _resolver.choice(layer, m) for m in tokens}


def why_off() -> str | None:
    """The variable that keeps us out of this process, if one does."""
    if os.environ.get(SWITCH, "0") not in ("", "0"):
        return f"{SWITCH} is set"
    wanted = os.environ.get(_PLUGINS)
    if wanted and _OUR_NAME not in (name.strip() for name in wanted.split(",")):
        return f"{_PLUGINS}={wanted} does not name {_OUR_NAME}"
    return None


def attach(layer: ModuleType, way: str, started: float | None = None) -> State:
    """Hook the engine whose layer module has been executed; `way` is how we came to know of it.

    `started`: when that was, by time.perf_counter(), so that our imports count.
    """
    global _state  # noqa: PLW0603 - a process is hooked or it is not
    if not _state.is_active:
        _state = _attached(layer, way, time.perf_counter() if started is None else started)
    return _state


def _attached(layer: ModuleType, way: str, started: float) -> State:
    global _resolver  # noqa: PLW0603
    if why := why_off():
        return State(False, why)
    try:
        engine = targets.found(layer)
        resolver = lookup.Resolver(engine, lambda: places(engine.engine), lambda: _first_call(engine, way))
        replaced = ((engine.lookup, lookup.replacement(engine, resolver)), (engine.launch, launch.replacement(engine)))
        for original, ours in replaced:
            targets.replace(original, ours)
        _resolver = resolver
    except Exception as error:  # the engine runs as if we were not installed
        why = f"{type(error).__name__}: {error}"
        warn_once(f"{__version__} is off, the engine runs as it is: {why}")  # two ways in may meet the same
        return State(False, why)
    return State(True, way, 1000 * (time.perf_counter() - started))


def _first_call(engine: Targets, way: str) -> None:
    """A layer runs: the server's log is open, and all of the engine has been imported."""
    log.info("sglang-moe-ext %s is active in SGLang %s, by %s", __version__, engine.engine.version_text, way)
    if os.environ.get(CAPTURE):
        _capture()


def _capture() -> None:
    try:
        from sglang_moe_ext.engines.sglang import runner_hook
        from sglang_moe_ext.serving import capture

        wish, runner = capture.wish(os.environ), sys.modules.get(runner_hook.MODULE)
        if wish is not None and runner is not None:
            capture.install(runner, wish)
    except Exception as error:  # the layers run uncaptured
        warn_once(f"{CAPTURE} is passed over: {type(error).__name__}: {error}")
