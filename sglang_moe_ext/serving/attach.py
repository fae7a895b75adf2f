"""Replace an engine's functions by our hooks: all of them or none, once a process, and without ever raising."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Literal, Protocol, cast

from sglang_moe_ext import __version__, env
from sglang_moe_ext.engines.lookup_args import LookupLayer
from sglang_moe_ext.serving.guard import warn_once
from sglang_moe_ext.serving.table_selection import Choice
from sglang_moe_ext.untrusted import show

if TYPE_CHECKING:
    from sglang_moe_ext.serving.sglang_lookup_hook import ConfigResolver
    from sglang_moe_ext.serving.vllm_lookup_hook import VllmTableResolver

Engine = Literal["sglang", "vllm"]
_OUR_NAME = "sglang_moe_ext"


class ConfigChooser(Protocol):
    """The resolver that the hooks of one engine ask."""

    def choice(self, layer: LookupLayer, tokens: int) -> Choice: ...

    def remarks(self, layer: LookupLayer) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class EngineHooks:
    """How one engine is hooked. `keeps_out`: whether its own `plugins` variable leaves out a plugin.

    `open_log`: let our lines reach the engine's log, before the layer is hooked.
    """

    plugins: str
    keeps_out: Callable[[str | None, str], bool]
    put_in: Callable[[ModuleType, str], ConfigChooser]
    open_log: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class HookState:
    """Whether a process is hooked: by which way, or why not, and the milliseconds that it took."""

    is_active: bool
    why: str
    ms: float = 0.0


_ABSENT = HookState(False, "the engine's layer has not been imported")
_choosers: dict[Engine, ConfigChooser] = {}
_states: dict[Engine, HookState] = {}


_lock = threading.RLock()
_being_attached: set[Engine] = set()


def state(engine: Engine = "sglang") -> HookState:
    """Whether this process is hooked."""
    return _states.get(engine, _ABSENT)


def choices(layer: LookupLayer, tokens: Sequence[int], engine: Engine = "sglang") -> dict[int, Choice]:
    """What this process takes at each M, and why; empty if it is not hooked."""
    chooser = _choosers.get(engine)
    return {} if chooser is None else {m: chooser.choice(layer, m) for m in tokens}


def remarks(layer: LookupLayer, engine: Engine = "sglang") -> tuple[str, ...]:
    """What is odd about the tables of the layer; empty if this process is not hooked."""
    chooser = _choosers.get(engine)
    return () if chooser is None else chooser.remarks(layer)


def sglang_resolver() -> ConfigResolver | None:
    """What answers SGLang's layers in this process; None if it is not hooked."""
    return cast("ConfigResolver | None", _choosers.get("sglang"))


def vllm_resolver() -> VllmTableResolver | None:
    """What answers vLLM's layers in this process; None if it is not hooked."""
    return cast("VllmTableResolver | None", _choosers.get("vllm"))


def kernel_plans(layer: LookupLayer, tokens: Sequence[int]) -> dict[int, str]:
    """Which of our kernel plans SGLang's layers take, at each M that has one, and if only where a graph is captured."""
    if (found := sglang_resolver()) is None:
        return {}
    plans = {m: (found.plan(layer, m), found.plan(layer, m, in_graph=True)) for m in tokens}
    return {
        m: f"{in_graph}{'' if eager == in_graph else ' (in CUDA graphs alone)'}"
        for m, (eager, in_graph) in plans.items()
        if in_graph is not None
    }


def decline_plan(layer: LookupLayer) -> None:
    """Let SGLang's own kernels run for layers of such weights from now on."""
    if (found := sglang_resolver()) is not None:
        found.decline_plan(layer.w1_shape, layer.w2_shape)


def hooks_of(engine: Engine) -> EngineHooks:
    """How that engine is hooked; the other engine's modules are not loaded."""
    if engine == "vllm":
        from sglang_moe_ext.serving import vllm_hooks

        hooks = (vllm_hooks.excludes_plugin, vllm_hooks.install_hooks, vllm_hooks.log_through_engine)
        return EngineHooks(env.VLLM_PLUGINS, *hooks)
    from sglang_moe_ext.serving import sglang_hooks

    return EngineHooks(env.SGLANG_PLUGINS, sglang_hooks.excludes_plugin, sglang_hooks.install_hooks)


def why_off(half: EngineHooks) -> str | None:
    """The variable that keeps us out of this process, if one does."""
    if env.is_on(env.DISABLE):
        return f"{env.DISABLE} is set"
    wanted = os.environ.get(half.plugins)
    if half.keeps_out(wanted, _OUR_NAME):
        return f"{half.plugins}={show(wanted)} does not name {_OUR_NAME}"
    return None


def attach(layer: ModuleType, way: str, started: float | None = None) -> HookState:
    """Hook the engine whose layer module has been executed; `way` is how we came to know of it.

    `started`: when that was, by time.perf_counter(), so that our imports count.
    """
    engine: Engine = "vllm" if layer.__name__.partition(".")[0] == "vllm" else "sglang"
    with _lock:  # threads may import the layer at once; the import of a hook's module may come back here
        if not state(engine).is_active and engine not in _being_attached:
            _being_attached.add(engine)
            try:
                _states[engine] = _attach(engine, layer, way, time.perf_counter() if started is None else started)
            finally:
                _being_attached.discard(engine)
        return state(engine)


def _attach(engine: Engine, layer: ModuleType, way: str, started: float) -> HookState:
    try:
        half = hooks_of(engine)
        if why := why_off(half):
            return HookState(False, why)
        _choosers[engine] = half.put_in(layer, way)
    except Exception as error:  # the engine runs as if we were not installed
        why = f"{type(error).__name__}: {show(error)}"
        warn_once(f"{__version__} is off, the engine runs as it is: {why}")  # two ways in may meet the same
        return HookState(False, why)
    return HookState(True, way, 1000 * (time.perf_counter() - started))
