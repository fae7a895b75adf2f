"""`sglang-moe-ext overlay`: tables alone, by an environment variable, for processes of SGLang that no hook reaches."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_moe_ext import env, package_data
from sglang_moe_ext.cli.command import Command
from sglang_moe_ext.core import EngineError, MoEExtError
from sglang_moe_ext.engines.sglang import installation, overlay, overlay_tables
from sglang_moe_ext.engines.sglang.overlay_tables import Outcome, Sources
from sglang_moe_ext.engines.vllm import installation as vllm
from sglang_moe_ext.tuning import install_target


def add_to(parser: argparse.ArgumentParser) -> None:
    """The command has no flags of its own."""


def _sources(configs_root: Path, triton: str) -> Sources:
    tuned = package_data.folder("tuned_configs")
    users = install_target.store_folder("sglang", triton).parent
    return Sources([users] if tuned is None else [users, tuned / "configs"], configs_root)


def run(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Build the overlay of the engine and the Triton that run here, and give the document of what was written.

    Raises:
        MoEExtError: there is no engine, the variable is set to another folder, or the overlay cannot be written.
    """
    engine, triton = installation.find(), installation.running_triton()
    if engine is None and vllm.find() is not None:
        raise EngineError(
            "overlay is for SGLang, which is not installed here; a vLLM with the plugin reads your store, and "
            f"one without it the folder that {env.VLLM_CONFIG_FOLDER} names: sglang-moe-ext install --output-dir FOLDER"
        )
    if engine is None or triton is None:
        raise EngineError("SGLang and Triton are not both installed here: run overlay where the server runs")
    root = overlay.overlay_folder(engine).absolute()
    set_by_user = os.environ.get(env.SGLANG_CONFIG_DIR)
    if set_by_user and Path(set_by_user).absolute() != root:
        raise EngineError(
            f"{env.SGLANG_CONFIG_DIR} is {set_by_user}, and a server reads no other folder: unset it, or put your "
            "tables there with `sglang-moe-ext install`"
        )
    destination = install_target.choose_for_sglang("overlay", root, engine, triton)
    assert destination is not None  # its place is given
    overlay.build(root, engine.configs_root)
    sources = _sources(engine.configs_root, triton)
    outcome: Outcome = {}
    for name in overlay_tables.layers(sources):
        outcome |= _put(name, sources, destination.folder, engine.version)
    return _report(outcome, root)


def _put(name: str, sources: Sources, folder: Path, version: tuple[int, int, int]) -> Outcome:
    try:
        return overlay_tables.put(name, sources, folder, version)
    except MoEExtError as error:
        return {folder / name: str(error)}


def _report(outcome: Outcome, root: Path) -> Mapping[str, Any]:
    written = [str(path) for path, why in outcome.items() if why is None]
    kept = {str(path): why for path, why in outcome.items() if why is not None}
    for name in written:
        print(f"wrote {name}")
    for name, why in kept.items():
        print(f"kept  {name}: {why}")
    print(f"export {env.SGLANG_CONFIG_DIR}={shlex.quote(str(root))}")
    return {"written": written, "kept": kept, "environment": {env.SGLANG_CONFIG_DIR: str(root)}}


COMMAND = Command(
    name="overlay",
    summary="make a folder of tables for SGLang processes that the plugin does not reach",
    description=(
        f"Make a folder that links the tables of SGLang and adds yours where they are better, and print the\n"
        f"{env.SGLANG_CONFIG_DIR} that makes SGLang read it. Only processes that the plugin does not reach need it.\n"
        "Run it again after an upgrade of SGLang or Triton. vLLM reads the folder of your store directly."
    ),
    examples=(
        ('eval "$(sglang-moe-ext overlay | grep ^export)"', "a server started in this shell then reads the folder"),
    ),
    add_to=add_to,
    run=run,
)
