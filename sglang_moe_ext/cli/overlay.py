"""`sglang-moe-ext overlay`: tables alone, by an environment variable, for processes of SGLang that no hook reaches."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path

from sglang_moe_ext import env, package_data
from sglang_moe_ext.core import EngineError, MoEExtError
from sglang_moe_ext.engines.sglang import config_dir, config_dir_tables, installation
from sglang_moe_ext.engines.sglang.config_dir_tables import Outcome, Sources
from sglang_moe_ext.tuning import install_target


def add_to(parser: argparse.ArgumentParser) -> None:
    """The command takes no flags; its help says how to use what it prints."""
    parser.epilog = (
        f'In a shell: eval "$(sglang-moe-ext overlay | grep ^export)". A server started there reads the folder that '
        f"{env.SGLANG_CONFIG_DIR} then names: the engine's own tables, and ours where they are better. Run it again "
        "after an upgrade of SGLang or Triton."
    )


def _sources(configs_root: Path, triton: str) -> Sources:
    tuned = package_data.folder("tuned_configs")
    users = install_target.store_folder("sglang", triton).parent
    return Sources([users] if tuned is None else [users, tuned / "configs"], configs_root)


def run(arguments: argparse.Namespace) -> None:
    """Build the overlay of the engine and the Triton that run here; the last line printed is JSON.

    Raises:
        MoEExtError: there is no engine, the variable is set to another folder, or the overlay cannot be written.
    """
    engine, triton = installation.find(), installation.running_triton()
    if engine is None or triton is None:
        raise EngineError("SGLang and Triton are not both installed here: run overlay where the server runs")
    root = config_dir.overlay_folder(engine).absolute()
    set_by_user = os.environ.get(env.SGLANG_CONFIG_DIR)
    if set_by_user and Path(set_by_user).absolute() != root:
        raise EngineError(
            f"{env.SGLANG_CONFIG_DIR} is {set_by_user}, and a server reads no other folder: unset it, or put your "
            "tables there with `sglang-moe-ext install`"
        )
    destination = install_target.choose_for_sglang("overlay", root, engine, triton)
    assert destination is not None  # its place is given
    config_dir.build(root, engine.configs_root)
    sources = _sources(engine.configs_root, triton)
    outcome: Outcome = {}
    for name in config_dir_tables.layers(sources):
        outcome |= _put(name, sources, destination.folder, engine.version)
    _say(outcome, root)


def _put(name: str, sources: Sources, folder: Path, version: tuple[int, int, int]) -> Outcome:
    try:
        return config_dir_tables.put(name, sources, folder, version)
    except MoEExtError as error:
        return {folder / name: str(error)}


def _say(outcome: Outcome, root: Path) -> None:
    written = [str(path) for path, why in outcome.items() if why is None]
    kept = {str(path): why for path, why in outcome.items() if why is not None}
    for name in written:
        print(f"wrote {name}")
    for name, why in kept.items():
        print(f"kept  {name}: {why}")
    print(f"export {env.SGLANG_CONFIG_DIR}={shlex.quote(str(root))}")
    print(json.dumps({"written": written, "kept": kept, "environment": {env.SGLANG_CONFIG_DIR: str(root)}}))
