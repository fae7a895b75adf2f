"""Which engine a command is about where the user names none: the one that is installed, and SGLang where both are."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.engines.registry import ENGINES

_WITHOUT_ENGINE: EngineName = "sglang"


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add --engine."""
    parser.add_argument(
        "--engine",
        choices=tuple(ENGINES),
        help="engine that the command is about (default: the one installed here; SGLang where both are)",
    )


def installed_engines() -> Mapping[EngineName, bool]:
    """Whether each engine is installed in this environment."""
    return {name: adapter.find() is not None for name, adapter in ENGINES.items()}


def choose(named: EngineName | None) -> EngineName:
    """The engine that is meant."""
    if named is not None:
        return named
    return next((name for name, is_here in installed_engines().items() if is_here), _WITHOUT_ENGINE)


def describe_choice(named: EngineName | None) -> str | None:
    """A line that says which engine was chosen, where the user named none and that may surprise."""
    here = installed_engines()
    chosen = ENGINES[choose(named)].TITLE
    if named is not None or not here["vllm"]:
        return None
    if all(here.values()):
        other = next(ENGINES[name].TITLE for name in here if chosen != ENGINES[name].TITLE)
        return f"for {chosen}: {other} is installed here as well, and --engine chooses"
    return f"for {chosen}, the engine that is installed here"
