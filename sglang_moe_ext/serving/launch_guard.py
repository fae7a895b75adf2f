"""Guard an engine's launcher: a launch that Triton refuses runs with a smaller or plainer configuration instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_moe_ext.core import TableError, TileConfig
from sglang_moe_ext.engines import config_dict, launch_rules, launch_shape, running_engine
from sglang_moe_ext.engines.config_dict import ConfigDict
from sglang_moe_ext.serving.guard import degrade, warn_once
from sglang_moe_ext.tables import config_table
from sglang_moe_ext.untrusted import show

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_OF_KERNELS = frozenset({*config_table.FIELDS, "SPLIT_K"})
"""What the engines' kernels take of an entry; everything else is an option of Triton's."""


@dataclass(frozen=True, slots=True)
class GuardedLauncher:
    """An engine's function that launches one GEMM of a layer, as its callers call it: A, B, ... config, ...

    `override` is the configuration of the engine's `override_config`, None if none is in force. `fitted` is called
    before the first launch of a kind, and returns the entry to launch instead of the one that is asked for, if any.
    """

    function: Callable[..., Any]
    config_position: int
    override: Callable[[], object]
    fitted: Callable[[tuple[Any, ...], dict[str, Any]], ConfigDict | None] | None = None


def launch_hook(launcher: GuardedLauncher) -> Callable[..., Any]:
    """The function that replaces the launcher. What Triton refuses runs otherwise, from then on for its shape.

    Triton refuses before it launches anything, so a second try finds all tensors as they were. What torch.compile
    traces, as it does the attention of vLLM's K2 Horizon, is the engine's own launch: a graph cannot hold ours.
    """
    original, position, is_traced = launcher.function, launcher.config_position, running_engine.is_traced()
    known: dict[Any, ConfigDict | None] = {}

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
            if launcher.override() or (others := _alternatives(launcher, once, named, error)) is None:
                raise
            entry, result = _launch_first(launcher, (once, named), others, error)
            if (key := _key(position, args, kwargs)) is not None:
                known[key] = entry
            return result

    return launched


def _config(position: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    config: Mapping[str, Any] = args[position] if len(args) > position else kwargs["config"]
    return config


def _with_config(position: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], entry: ConfigDict) -> Arguments:
    if len(args) > position:
        return (*args[:position], dict(entry), *args[position + 1 :]), dict(kwargs)
    return args, {**kwargs, "config": dict(entry)}


def _key(position: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The configuration, and the weights that it is launched for; None if the call is not one of the engine's."""
    try:
        weights = args[1] if len(args) > 1 else kwargs["B"]
        hidden = args[0] if args else kwargs["A"]
        uses_tma = kwargs.get("a_use_tma"), kwargs.get("b_use_tma")
        entry = tuple(_config(position, args, kwargs).items())
        key = entry, tuple(weights.shape), weights.dtype, hidden.dtype, uses_tma
        hash(key)
    except (TypeError, KeyError, AttributeError):
        return None
    return key


def _known(
    known: dict[Any, ConfigDict | None], launcher: GuardedLauncher, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ConfigDict | None:
    if launcher.override() or (key := _key(launcher.config_position, args, kwargs)) is None:
        return None
    if launcher.fitted is None or key in known:
        return known.get(key)
    try:
        known[key] = launcher.fitted(args, kwargs)
    except Exception as error:  # whatever is broken here, the launch itself tells what fits
        warn_once(f"a launch is not checked before it runs: {type(error).__name__}: {show(error)}")
        known[key] = None
    return known[key]


def _alternatives(
    launcher: GuardedLauncher, args: tuple[Any, ...], kwargs: Mapping[str, Any], refused: Exception
) -> Iterator[ConfigDict] | None:
    """The entries to try instead, best first; None if Triton did not refuse the configuration."""
    is_too_large = running_engine.is_out_of_resources(refused)
    if not is_too_large and not running_engine.is_compile_failure(refused):
        return None
    entry = _config(launcher.config_position, args, kwargs)
    try:
        asked = config_table.parse_tile(entry)
    except TableError:  # vLLM's launcher for groups along K chooses a tile itself
        return None
    if is_too_large:
        return (config_dict.resize(entry, config) for config in degrade(asked))
    return _plainer(launcher, (args, dict(kwargs)), entry, asked)


def _plainer(
    launcher: GuardedLauncher, call: Arguments, entry: Mapping[str, Any], asked: TileConfig
) -> Iterator[ConfigDict]:
    """The entry without options of Triton's, then one small tile: each compilation takes a server seconds."""
    plain = {name: value for name, value in entry.items() if name in _OF_KERNELS}
    if len(plain) < len(entry):
        yield plain
    args, kwargs = call
    try:
        arguments = inspect.signature(launcher.function).bind(*args, **kwargs)
        arguments.apply_defaults()
        shape = launch_shape.shape_of(arguments.arguments)
    except (TypeError, ValueError, LookupError, AttributeError):  # not called as the engine calls it
        return
    yield config_dict.resize(plain, launch_rules.plain_tile(asked.block_m, shape))


def _launch_first(
    launcher: GuardedLauncher, call: Arguments, entries: Iterator[ConfigDict], refused: Exception
) -> tuple[ConfigDict, Any]:
    """The first of the entries that Triton does not refuse, and what the launch with it returned.

    Raises:
        Exception: `refused`, if Triton refuses all of them; another error of the engine's as it is.
    """
    position = launcher.config_position
    asked = config_dict.tile_of(_config(position, *call))
    for entry in entries:
        args, kwargs = _with_config(position, *call, entry)
        try:
            result = launcher.function(*args, **kwargs)
        except Exception as error:
            if not running_engine.is_out_of_resources(error) and not running_engine.is_compile_failure(error):
                raise
            continue
        config = config_dict.tile_of(entry)
        what = "does not fit this GPU" if running_engine.is_out_of_resources(refused) else "cannot be compiled"
        warn_once(f"{asked} {what} ({show(refused)}): runs {config} instead; tune this model on this GPU")
        return entry, result
    raise refused
