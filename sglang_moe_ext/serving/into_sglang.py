"""What our hooks put into SGLang: the answer to a layer's call, a launcher that fits, and the capture of routing."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from types import ModuleType

from sglang_moe_ext import __version__
from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines import running
from sglang_moe_ext.engines.sglang import sequence as known_sequence
from sglang_moe_ext.engines.sglang import targets
from sglang_moe_ext.engines.sglang.targets import Targets
from sglang_moe_ext.serving import launch, lookup, sequence
from sglang_moe_ext.serving.guard import warn_once
from sglang_moe_ext.serving.launch import Launcher
from sglang_moe_ext.serving.places import places

log = logging.getLogger(__name__)

PLUGINS = "SGLANG_PLUGINS"
CAPTURE = "SGLANG_MOE_EXT_CAPTURE"


def keeps_out(wanted: str | None, name: str) -> bool:
    """Whether that value of the engine's variable leaves out the plugin of that name."""
    return bool(wanted) and name not in (it.strip() for it in (wanted or "").split(","))


def put_in(layer: ModuleType, way: str) -> lookup.Resolver:
    """Replace the engine's functions, all or none.

    Raises:
        EngineError: something of the engine is not as it was.
    """
    engine = _with_known_sequence(targets.found(layer))
    resolver = lookup.Resolver(engine, lambda: places(engine.engine), lambda: _first_call(engine, way))
    launcher = Launcher(engine.launch, targets.CONFIG_POSITION, engine.override)
    replaced = [(engine.lookup, lookup.replacement(engine, resolver)), (engine.launch, launch.replacement(launcher))]
    if engine.sequence is not None:
        replaced.append((engine.sequence, sequence.replacement(engine, engine.sequence, resolver.decline_path)))
    for original, ours in replaced:
        running.replace("sglang", original, ours)
    return resolver


def _with_known_sequence(engine: Targets) -> Targets:
    """Without the sequence of kernels where it takes other arguments: all else can still be put in."""
    try:
        if engine.sequence is not None:
            known_sequence.parameters(engine.sequence)
    except EngineError as error:
        warn_once(f"the engine's own kernels run: {error}")
        return replace(engine, sequence=None)
    return engine


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
