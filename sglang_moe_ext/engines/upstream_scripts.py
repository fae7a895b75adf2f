"""Patch the functions of upstream's benchmark scripts, wherever copies of them are, told by what they are."""

from __future__ import annotations

import argparse
import functools
import inspect
import sys
from collections.abc import Callable, MutableMapping
from typing import Any

from sglang_moe_ext.engines.sglang import benchmark_scripts as sglang
from sglang_moe_ext.engines.vllm import benchmark_scripts as vllm

Patch = Callable[[Callable[..., Any]], Callable[..., Any]]

PATCHES: dict[str, tuple[tuple[str, ...], Patch]] = {
    "get_model_config": (("model_name", "tp_size"), sglang.patch),
    "get_model_params": (("config",), vllm.patch),
}
"""By name: the first parameters of upstream's function, and what makes the patched one of it."""


def patch_module(names: MutableMapping[str, Any]) -> None:
    """Replace upstream's functions in a module's namespace by patched ones, once."""
    for name, (parameters, patch) in PATCHES.items():
        function = names.get(name)
        if inspect.isfunction(function) and not hasattr(function, _PATCHED) and _starts_with(function, parameters):
            patched = patch(function)
            if patched is not function:
                setattr(patched, _PATCHED, True)
                names[name] = patched


_PATCHED = "_sglang_moe_ext_patched"


def _starts_with(function: Callable[..., Any], parameters: tuple[str, ...]) -> bool:
    return tuple(inspect.signature(function).parameters)[: len(parameters)] == parameters


def patch_when_arguments_are_parsed() -> None:
    """Patch `__main__` and the modules that it may have them from, once, at the first `parse_args` of the process."""
    upstream = argparse.ArgumentParser.parse_args
    waiting = [True]

    @functools.wraps(upstream)
    def parse_args(*args: Any, **kwargs: Any) -> Any:
        if waiting:
            waiting.clear()
            if argparse.ArgumentParser.parse_args is parse_args:
                argparse.ArgumentParser.parse_args = upstream  # type: ignore[method-assign]
            _patch_loaded_modules()
        return upstream(*args, **kwargs)

    argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]


def _patch_loaded_modules() -> None:
    """Patch the functions where they are defined, then each name of them in `__main__`."""
    main = vars(sys.modules["__main__"])
    for name in PATCHES:
        function = main.get(name)
        owner = sys.modules.get(getattr(function, "__module__", None) or "")
        if owner is not None:
            patch_module(vars(owner))
            if name in main and vars(owner).get(name) is not function:
                main[name] = vars(owner).get(name, function)
    patch_module(main)
