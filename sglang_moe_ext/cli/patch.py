"""`sglang-moe-ext patch`: put our hooks into an SGLang that no hook reaches, take them out, say how it stands."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from sglang_moe_ext.cli.command import Command
from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines.sglang import installation, source_patch
from sglang_moe_ext.engines.sglang.source_patch import HookRoutes


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--apply", action="store_true", help="insert the lines at the end of SGLang's layer module")
    what.add_argument("--revert", action="store_true", help="remove the lines: the file is the release's again")
    what.add_argument(
        "--status", action="store_true", help="print whether the lines are inserted, and whether they are needed"
    )


def _said_of(ways: HookRoutes) -> str:
    if ways.startup_file is not None:
        return f"no patch is needed: {ways.startup_file} reaches every process of this Python"
    if ways.entry_point:
        return f"the entry point reaches servers; for {ways.unreached} a patch is needed"
    return "a patch is needed: neither the startup file nor the entry point reaches this environment"


def run(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Do what the flag says, and give the document of how it stands.

    Raises:
        EngineError: there is no engine, no patch for it, or its file is not the release's or cannot be written.
    """
    engine = installation.find()
    if engine is None:
        raise EngineError(
            "SGLang is not installed in this environment: run patch where the server runs; vLLM needs no patch"
        )
    patch = source_patch.find(engine)
    changed = False
    if arguments.apply:
        changed = source_patch.apply(patch, engine)
    elif arguments.revert:
        changed = source_patch.revert(patch, engine)
    state = source_patch.state(patch, engine)
    ways = source_patch.find_routes(engine)
    already = "" if changed or arguments.status else " already"
    print(f"SGLang {engine.version_text}: {patch.file(engine)}: {state}{already}")
    print(_said_of(ways))
    return {
        "engine": engine.version_text,
        "file": str(patch.file(engine)),
        "state": state,
        "changed": changed,
        "startup_file": None if ways.startup_file is None else str(ways.startup_file),
        "entry_point": ways.entry_point,
        "needed_for": ways.unreached,
    }


COMMAND = Command(
    name="patch",
    summary="insert the call of this plugin into SGLang's source, where nothing else loads it",
    description=(
        "Insert eight lines at the end of SGLang's layer module that load this plugin, or remove them. Needed\n"
        "only for installations that read neither startup files nor entry points, such as `pip install --target`."
    ),
    examples=(
        ("sglang-moe-ext patch --status", "print whether the lines are inserted, and whether they are needed"),
        ("sglang-moe-ext patch --apply", "insert them"),
        ("sglang-moe-ext patch --revert", "remove them: the file is the release's again, byte for byte"),
    ),
    add_to=add_to,
    run=run,
)
