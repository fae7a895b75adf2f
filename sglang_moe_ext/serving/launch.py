"""The function that stands in the place of an engine's launcher: no configuration is too large for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_moe_ext.engines import entries, running
from sglang_moe_ext.engines.entries import Entry
from sglang_moe_ext.serving.guard import degraded, warn_once

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Launcher:
    """An engine's function that launches one GEMM of a layer, as its callers call it: A, B, ... config, ...

    `override` is the configuration of the engine's `override_config`, None where none is in force. `fitted` says before
    the first launch of a kind which smaller entry runs in the place of the one that is asked for, if one must.
    """

    function: Callable[..., Any]
    config_position: int
    override: Callable[[], object]
    fitted: Callable[[tuple[Any, ...], dict[str, Any]], Entry | None] | None = None


def replacement(launcher: Launcher) -> Callable[..., Any]:
    """A function to stand where the launcher stood: what Triton refuses runs smaller, from then on for its shape.

    Triton refuses before it launches anything, so a second try finds all tensors as they were. What torch.compile
    traces, as it does the attention of vLLM's K2 Horizon, is the engine's own launch: a graph has no place for ours.
    """
    original, position, is_traced = launcher.function, launcher.config_position, running.is_traced()
    known: dict[Any, Entry | None] = {}

    @functools.wraps(original)
    def launched(*args: Any, **kwargs: Any) -> Any:
        if is_traced():
            return original(*args, **kwargs)
        once, named = args, kwargs
        if (known or launcher.fitted) and (entry := _known(known, launcher, args, kwargs)) is not None:
            once, named = _with_config(position, args, kwargs, entry)
        try:
            return original(*once, **named)
        except Exception as error:
            if not running.is_out_of_resources(error) or launcher.override():
                raise
            entry, result = _smaller(launcher, once, named, error)
            known[_key(position, args, kwargs)] = entry
            return result

    return launched


def _config(position: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    config: Mapping[str, Any] = args[position] if len(args) > position else kwargs["config"]
    return config


def _with_config(position: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], entry: Entry) -> Arguments:
    if len(args) > position:
        return (*args[:position], dict(entry), *args[position + 1 :]), dict(kwargs)
    return args, {**kwargs, "config": dict(entry)}


def _key(position: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The configuration, and the weights that it is launched for: what decides how much memory it asks for."""
    weights = args[1] if len(args) > 1 else kwargs["B"]
    hidden = args[0] if args else kwargs["A"]
    uses_tma = kwargs.get("a_use_tma"), kwargs.get("b_use_tma")
    return tuple(_config(position, args, kwargs).items()), tuple(weights.shape), weights.dtype, hidden.dtype, uses_tma


def _known(
    known: dict[Any, Entry | None], launcher: Launcher, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Entry | None:
    if launcher.override():
        return None
    try:
        key = _key(launcher.config_position, args, kwargs)
        if launcher.fitted is None or key in known:
            return known.get(key)
    except (TypeError, KeyError, AttributeError):  # called in a way that is not the engine's
        return None
    try:
        known[key] = launcher.fitted(args, kwargs)
    except Exception as error:  # whatever is broken here, the launch itself tells what fits
        warn_once(f"a launch is not looked at before it runs: {type(error).__name__}: {error}")
        known[key] = None
    return known[key]


def _smaller(
    launcher: Launcher, args: tuple[Any, ...], kwargs: Mapping[str, Any], refused: Exception
) -> tuple[Entry, Any]:
    """The first smaller entry that Triton does not refuse, and what the launch with it returned.

    Raises:
        Exception: `refused`, where Triton refuses all of them.
    """
    entry = _config(launcher.config_position, args, kwargs)
    if "BLOCK_SIZE_N" not in entry:  # vLLM's launcher for groups along K chooses a tile itself
        raise refused
    asked = entries.tile_of(entry)
    for config in degraded(asked):
        smaller = entries.resized(entry, config)
        try:
            once_more, named = _with_config(launcher.config_position, args, kwargs, smaller)
            result = launcher.function(*once_more, **named)
        except Exception as error:
            if not running.is_out_of_resources(error):
                raise
            continue
        warn_once(f"{asked} does not fit this GPU ({refused}): runs {config} instead; tune this model on this GPU")
        return smaller, result
    raise refused
