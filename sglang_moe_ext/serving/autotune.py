"""Tune a layer when a server first starts with it: before its weights are loaded, in a process of its own.

What is imported here is loaded by servers that ask for it alone, by the variable that `env.AUTOTUNE` names.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from sglang_moe_ext import __version__, env
from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines.starting_layer import StartingLayer
from sglang_moe_ext.serving import attach
from sglang_moe_ext.serving.attach import Engine
from sglang_moe_ext.serving.tuner_process import TuneOutcome, Tuner, tune_once
from sglang_moe_ext.tables import user_store
from sglang_moe_ext.untrusted import show

log = logging.getLogger(__name__)

DEFAULT_S = 60.0
"""What `1` stands for."""
_FEWEST_S, _MOST_S = 5.0, 3600.0
_FULL_EFFORT_S = 240.0
"""From here on a run compares the candidates of full effort; below, it would compare few batch sizes with them."""
_hooked: set[Engine] = set()
_asked: set[Engine] = set()


def hook_loading(module: ModuleType) -> None:
    """Replace the engine's function that loads a model, in its module that has been imported. Never raises."""
    try:
        engine, loading = _engine_of(module)
        owner = getattr(module, loading.CLASS)
        original = vars(owner)[loading.FUNCTION]
        if engine not in _hooked:  # the startup file and the entry point both come here
            _hooked.add(engine)
            setattr(owner, loading.FUNCTION, _tuned_first(engine, loading.starting_layer, original))
    except Exception as error:  # the server starts as without us
        _pass_over(error)


def _engine_of(module: ModuleType) -> tuple[Engine, Any]:
    if module.__name__.partition(".")[0] == "vllm":
        from sglang_moe_ext.engines.vllm import model_loading as vllm_loading

        return "vllm", vllm_loading
    from sglang_moe_ext.engines.sglang import model_loading

    return "sglang", model_loading


def _tuned_first(
    engine: Engine, starting_layer: Callable[[Any], StartingLayer], original: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        if engine not in _asked:  # a process loads its model first, and may load drafts or the same again
            _asked.add(engine)
            before_load(engine, lambda: starting_layer(self))
        return original(self, *args, **kwargs)

    return load_model


def before_load(engine: Engine, starting_layer: Callable[[], StartingLayer]) -> None:
    """Tune the layer unless that was done; one line says what came of it. Never raises but for an interrupt."""
    try:
        hooks = attach.hooks_of(engine)
        hooks.open_log()
        if attach.why_off(hooks) is not None:
            return
        seconds = parse_budget(os.environ.get(env.AUTOTUNE, ""))
        outcome = _tune(engine, starting_layer(), seconds)
    except Exception as error:  # the server starts with what it would have had
        _pass_over(error)
    else:
        if outcome.text:
            log.log(logging.INFO if outcome.is_settled else logging.WARNING, "sglang-moe-ext: %s", outcome.text)


def parse_budget(text: str) -> float:
    """Seconds that a start may take longer.

    Raises:
        EngineError: it is no such number.
    """
    try:
        seconds = DEFAULT_S if text == "1" else float(text)
    except ValueError:
        seconds = math.nan
    if not _FEWEST_S <= seconds <= _MOST_S:
        raise EngineError(f"{env.AUTOTUNE}={show(text)}: expected 1, or {_FEWEST_S:.0f} to {_MOST_S:.0f} seconds")
    return seconds


def _tune(engine: Engine, layer: StartingLayer, seconds: float) -> TuneOutcome:
    from sglang_moe_ext.engines import installed_engines

    found = installed_engines.find_distribution(engine)
    version, triton = "" if found is None else found[0], installed_engines.running_triton()
    # What decides the table: neither the seconds, nor which of several equal GPUs this server has.
    asked = [layer.flags, layer.tokens, layer.device_name, layer.config, _config_digest(layer.config)]
    facts = [__version__, engine, version, triton, asked]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    tuner = Tuner(user_store.root() / "autotune" / key, (*layer.flags, *_measuring_flags(layer, seconds)), seconds)
    if not (outcome := tuner.read_settled()):
        names = f"{layer.device_name}, {len(layer.tokens)} batch sizes"
        log.info("sglang-moe-ext tunes %s for %s before it loads (%.0f s)", show(layer.config), names, seconds)
        outcome = tune_once(tuner, time.time())
    return outcome


def _measuring_flags(layer: StartingLayer, seconds: float) -> list[str]:
    gpus = ",".join(map(str, layer.gpus))
    effort = "quick" if seconds < _FULL_EFFORT_S else "full"
    return ["--gpus", gpus, "--effort", effort, "--install", "none", "--batch-size", *map(str, layer.tokens)]


def _config_digest(model: str) -> str:
    """Of the model's config.json where it lies in a folder; a name of the hub stands for itself."""
    try:
        return hashlib.sha256((Path(model) / "config.json").read_bytes()).hexdigest()
    except OSError:
        return ""


def _pass_over(error: Exception) -> None:
    log.warning("sglang-moe-ext: %s is passed over: %s", env.AUTOTUNE, show(error))
