"""`sglang-moe-ext install`: put the tables of the user's own store into the engine, as after an upgrade of it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from sglang_moe_ext import api
from sglang_moe_ext.cli import engine_choice
from sglang_moe_ext.cli.command import Command
from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.stock import reinstall
from sglang_moe_ext.stock.reinstall import Reinstalled
from sglang_moe_ext.tables import user_store
from sglang_moe_ext.tuning import install_target


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    engine_choice.add_to(parser)
    install_target.add_to(parser)


def run(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Install every table that was made for the running Triton, and give the document of what was written.

    Raises:
        MoEExtError: there is no engine, or a place cannot be written.
    """
    if said := engine_choice.describe_choice(arguments.engine):
        print(said)
    engine = engine_choice.choose(arguments.engine)
    done = api.install(engine, where=arguments.install, output_dir=arguments.output_dir)
    _show(done)
    return {
        "engine": engine,
        "written": [str(path) for path in done.written],
        "kept": {str(path): why for path, why in done.kept.items()},
        "other_tritons": done.other_tritons,
        "environment": done.target.environment,
    }


def _show(done: Reinstalled) -> None:
    for path in done.written:
        print(f"wrote {path}")
    for path, why in done.kept.items():
        print(f"did not write {path}: {why}")
    if not done.written and not done.kept:
        print(f"no table for Triton {done.triton} in {user_store.root()}")
    for folder, count in done.other_tritons.items():
        print(
            f"not installed, made with Triton {reinstall.triton_of(folder)}: {count} in the store; a server of "
            f"{ENGINES[done.engine].TITLE} with the plugin reads them (`sglang-moe-ext doctor` shows it); "
            f"for entries tuned with Triton {done.triton}, run `sglang-moe-ext tune` again"
        )
    if done.target.note:
        print(done.target.note)


COMMAND = Command(
    name="install",
    summary="write the tables of your own store into SGLang or vLLM, as after an upgrade of it",
    description=(
        "Write the tables of your own store that were made for the Triton of this environment into SGLang's or vLLM's\n"
        "folder. A server in which the plugin is active reads the store itself and does not need this."
    ),
    examples=(
        ("sglang-moe-ext install", "into the engine of this environment"),
        ("sglang-moe-ext install --install overlay", "into a folder beside a read-only SGLang"),
        ("sglang-moe-ext install --engine vllm --output-dir tables", "as a folder for VLLM_TUNED_CONFIG_FOLDER"),
    ),
    add_to=add_to,
    run=run,
)
