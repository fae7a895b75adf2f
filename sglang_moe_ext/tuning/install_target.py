"""Where the tables of a run go: into the engine, into an overlay beside it, or into a folder of the user's."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sglang_moe_ext import env
from sglang_moe_ext.core import EngineError, MoEShape, StoreError
from sglang_moe_ext.engines.adapter import EngineAdapter, EngineName
from sglang_moe_ext.engines.sglang import overlay
from sglang_moe_ext.engines.sglang import table_names as sglang_names
from sglang_moe_ext.engines.sglang.installation import SglangInstallation
from sglang_moe_ext.engines.vllm import installation as vllm
from sglang_moe_ext.tables import files, user_store

Install = Literal["engine", "overlay", "none"]


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where tables go."""
    where = parser.add_argument_group("where to write")
    where.add_argument(
        "--install",
        choices=get_args(Install),
        default="engine",
        help="where to write the tables: the engine's own folder, an overlay beside it, or none but your own store "
        "(default engine)",
    )
    where.add_argument(
        "--output-dir",
        "--save-dir",
        type=Path,
        help="folder to write the tables to instead of installing them",
    )
    where.add_argument(
        "--force",
        action="store_true",
        help="predict although a measured table for this layer is shipped, stored or in the engine, which a server "
        "goes on taking",
    )


def _note(why: str, stored: Path, variable: str, root: Path, effect: str) -> str:
    """With our plugin a server needs no variable, which would put this folder before all measured tables."""
    return f"{why}our plugin serves {stored}; only where it is off, start the server with {variable}={root}{effect}"


@dataclass(frozen=True, slots=True)
class InstallTarget:
    """A folder of tables for one Triton, the variables that make a server read it, and a note for the user.

    `is_of_this_engine`: no other release of the engine reads it. `is_flat`: tables of every Triton lie in it.
    """

    folder: Path
    environment: dict[str, str]
    note: str | None = None
    is_of_this_engine: bool = False
    is_flat: bool = False

    @property
    def is_there(self) -> bool:
        """True where an engine that is told of it finds something to read."""
        return (self.folder if self.is_flat else self.folder.parent).is_dir()

    @property
    def environment_today(self) -> dict[str, str]:
        """Under which the engine reads where the tables will lie, once something lies there."""
        return self.environment if self.is_there else {}


def _configs(root: Path, triton: str) -> Path:
    return root / "configs" / sglang_names.version_folder(triton)


def choose_for_sglang(
    install: Install, output_dir: Path | None, engine: SglangInstallation | None, triton: str
) -> InstallTarget | None:
    """The place that a server will read, or None where the user's own store is the only one.

    Raises:
        EngineError: no engine could read a folder named after that Triton.
        StoreError: an overlay is needed and cannot be made.
    """
    writes_one = install != "none" or output_dir is not None
    if writes_one and not sglang_names.is_version_folder(sglang_names.version_folder(triton)):
        raise EngineError(
            f"Triton {triton} is a build of its own: since 0.5.12 a folder of that name ends SGLang's lookup; "
            "--install none keeps the tables in your own store"
        )
    if output_dir is not None:
        root = output_dir.absolute()
        effect = ", which replaces the engine's own tables"
        note = _note("", store_folder("sglang", triton), env.SGLANG_CONFIG_DIR, root, effect)
        return InstallTarget(_configs(root, triton), {env.SGLANG_CONFIG_DIR: str(root)}, note)
    if engine is None or install == "none":
        return None
    if set_by_user := os.environ.get(env.SGLANG_CONFIG_DIR):
        return InstallTarget(
            _configs(Path(set_by_user), triton), {}, f"{env.SGLANG_CONFIG_DIR} is set: its folder is the engine's"
        )
    if install == "engine":
        folder = _configs(engine.configs_root.parent, triton)
        if files.is_writable(folder):
            return InstallTarget(folder, {}, is_of_this_engine=True)
        return _overlay(engine, triton, f"{folder} is read-only: the tables go to an overlay; ")
    return _overlay(engine, triton, "")


def _overlay(engine: SglangInstallation, triton: str, why: str) -> InstallTarget:
    root = overlay.overlay_folder(engine)
    overlay.build(root, engine.configs_root)
    note = _note(why, store_folder("sglang", triton), env.SGLANG_CONFIG_DIR, root, "")
    return InstallTarget(_configs(root, triton), {env.SGLANG_CONFIG_DIR: str(root)}, note, is_of_this_engine=True)


def choose_for_vllm(
    install: Install, output_dir: Path | None, engine: vllm.VllmInstallation | None, triton: str
) -> InstallTarget | None:
    """The folder that a server of vLLM will read, or None where the user's own store is the only place.

    A folder of its own that the user names to vLLM comes first there, as a whole file; our plugin serves the store.
    """
    if output_dir is not None:
        root = output_dir.absolute()
        note = _note("", store_folder("vllm", triton), env.VLLM_CONFIG_FOLDER, root, "")
        return InstallTarget(root, {env.VLLM_CONFIG_FOLDER: str(root)}, note, is_flat=True)
    if engine is None or install == "none":
        return None
    if set_by_user := os.environ.get(env.VLLM_CONFIG_FOLDER):
        return InstallTarget(
            Path(set_by_user), {}, f"{env.VLLM_CONFIG_FOLDER} is set: vLLM looks there first", is_flat=True
        )
    why = ""
    if install == "engine":
        if files.is_writable(engine.configs_folder):
            return InstallTarget(engine.configs_folder, {}, is_flat=True)
        why = f"{engine.configs_folder} is read-only; "
    stored = store_folder("vllm", triton)
    note = _note(why, stored, env.VLLM_CONFIG_FOLDER, stored, "")
    return InstallTarget(stored, {env.VLLM_CONFIG_FOLDER: str(stored)}, note, is_flat=True)


CHOOSERS: Mapping[EngineName, Callable[[Install, Path | None, Any, str], InstallTarget | None]] = {
    "sglang": choose_for_sglang,
    "vllm": choose_for_vllm,
}
"""By engine, where the tables of an installation of it go."""


def table_names(adapter: EngineAdapter, shape: MoEShape, device_name: str) -> dict[bool, str]:
    """File names of the up table (False), and of the table for the down projection (True) where the engine has such."""
    which = (False, True) if adapter.HAS_DOWN_TABLES else (False,)
    return {down: adapter.file_name(adapter.table_key(shape, device_name, down=down)) for down in which}


def store_folder(engine: EngineName, triton: str) -> Path:
    """Where the user's own copy for that engine and that Triton lies."""
    return user_store.tables_folder(engine, sglang_names.version_folder(triton))


def check_store(engine: EngineName, triton: str) -> None:
    """Every run keeps its tables in the user's own store; better known before the work than after it.

    Raises:
        StoreError: it cannot be written.
    """
    folder = store_folder(engine, triton)
    if not files.is_writable(folder):
        raise StoreError(
            f"your own store cannot be written: {folder} is read-only, or no folder; set {env.STORE} to a folder that "
            "can be written"
        )
