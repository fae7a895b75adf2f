"""The function that stands in the place of SGLang's `invoke_fused_moe_kernel`: no configuration is too large for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from sglang_moe_ext.engines import entries
from sglang_moe_ext.engines.entries import Entry
from sglang_moe_ext.engines.sglang import targets
from sglang_moe_ext.engines.sglang.targets import CONFIG_POSITION, Targets
from sglang_moe_ext.serving.guard import degraded, warn_once

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def replacement(engine: Targets) -> Callable[..., Any]:
    """A function to stand where `engine.launch` stood: what Triton refuses runs smaller, from then on for its shape.

    Triton refuses before it launches anything, so a second try finds all tensors as they were.
    """
    original, package = engine.launch, engine.package
    fitting: dict[Any, Entry] = {}

    @functools.wraps(original)
    def invoke_fused_moe_kernel(*args: Any, **kwargs: Any) -> Any:
        if fitting and (known := _known(fitting, args, kwargs)) is not None:
            args, kwargs = _with_config(args, kwargs, known)
        try:
            return original(*args, **kwargs)
        except Exception as error:
            if not targets.is_out_of_resources(error) or package.get_config():
                raise
            entry, result = _smaller(original, args, kwargs, error)
            fitting[_key(args, kwargs)] = entry
            return result

    return invoke_fused_moe_kernel


def _config(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    config: Mapping[str, Any] = args[CONFIG_POSITION] if len(args) > CONFIG_POSITION else kwargs["config"]
    return config


def _with_config(args: tuple[Any, ...], kwargs: Mapping[str, Any], entry: Entry) -> Arguments:
    if len(args) > CONFIG_POSITION:
        return (*args[:CONFIG_POSITION], dict(entry), *args[CONFIG_POSITION + 1 :]), dict(kwargs)
    return args, {**kwargs, "config": dict(entry)}


def _key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The configuration, and the weights that it is launched for: what decides how much memory it asks for."""
    weights = args[1] if len(args) > 1 else kwargs["B"]
    hidden = args[0] if args else kwargs["A"]
    uses_tma = kwargs.get("a_use_tma"), kwargs.get("b_use_tma")
    return tuple(_config(args, kwargs).items()), tuple(weights.shape), weights.dtype, hidden.dtype, uses_tma


def _known(fitting: Mapping[Any, Entry], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Entry | None:
    try:
        return fitting.get(_key(args, kwargs))
    except (TypeError, KeyError, AttributeError):  # called in a way that is not the engine's
        return None


def _smaller(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], refused: Exception
) -> tuple[Entry, Any]:
    """The first smaller entry that Triton does not refuse, and what the launch with it returned.

    Raises:
        Exception: `refused`, where Triton refuses all of them.
    """
    entry = _config(args, kwargs)
    asked = entries.tile_of(entry)
    for config in degraded(asked):
        smaller = entries.resized(entry, config)
        try:
            once_more, named = _with_config(args, kwargs, smaller)
            result = original(*once_more, **named)
        except Exception as error:
            if not targets.is_out_of_resources(error):
                raise
            continue
        warn_once(f"{asked} does not fit this GPU ({refused}): runs {config} instead; tune this model on this GPU")
        return smaller, result
    raise refused
