"""What is wrong with the tables for a layer, wherever a server looks for them: found without asking the engine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sglang_moe_ext import env
from sglang_moe_ext.cli.doctor_layers import LayerUnderTest
from sglang_moe_ext.core import TableError
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.serving.table_search import TableDir
from sglang_moe_ext.stock import inventory
from sglang_moe_ext.tables import config_table, files
from sglang_moe_ext.tuning import install_target


def find_problems(layer: LayerUnderTest, engine: EngineName) -> tuple[str, ...]:
    """A line for each table that cannot be read, and for a variable that the engine alone cannot live with."""
    names = list(install_target.table_names(ENGINES[engine], layer.shape, layer.gpu.device_name).values())
    of_tables = (
        problem
        for table_dir in inventory.table_dirs(engine)
        for folder in _folders(table_dir)
        for name in names
        if (folder / name).exists()
        for problem in _problems_of(folder / name, engine, read_by_engine=table_dir.is_engines)
    )
    of_names = (
        problem
        for table_dir in inventory.table_dirs(engine)
        for folder in _folders(table_dir)
        for problem in _problems_of_spelling(layer, engine, folder)
    )
    return (*_problems_of_variable(engine, names), *of_tables, *of_names)


def _folders(table_dir: TableDir) -> list[Path]:
    return [table_dir.root] if table_dir.is_flat else sorted(table_dir.root.glob("triton_*"))


def _problems_of(path: Path, engine: EngineName, *, read_by_engine: bool) -> Iterator[str]:
    try:
        config_table.read(path)
    except TableError as error:
        yield f"skipped: {error}"
        return
    if engine == "sglang" and read_by_engine and (error_of_engine := error_of_sglang(path)) is not None:
        yield f"SGLang alone cannot read {path}: {error_of_engine}"


def error_of_sglang(path: Path) -> str | None:
    """SGLang's own error with a table that this package can read, None where it reads it.

    Its lookup makes a number of every key: `{int(key): val for key, val in json.load(f).items()}` (0.5.5 to 0.5.23).
    """
    try:
        for key in json.loads(files.read_bounded(path)):
            int(key)
    except ValueError as error:
        return f"ValueError: {error}"
    return None


_LEVELS = ("{name}", "configs/{name}", "triton_*/{name}", "triton_*/configs/{name}")
"""Where the table of a folder that the user arranged otherwise may lie."""


def _problems_of_variable(engine: EngineName, names: Sequence[str]) -> Iterator[str]:
    named = os.environ.get(env.SGLANG_CONFIG_DIR)
    if engine != "sglang" or not named:
        return
    folder = Path(named)
    if not (folder / "configs").is_dir():
        what = "has no folder configs" if folder.is_dir() else "is not there"
        yield (
            f"{env.SGLANG_CONFIG_DIR}={folder} {what}: SGLang alone ends with FileNotFoundError at the first lookup "
            "that finds no table; unset it, or put the triton_X_Y_Z folders into a folder configs there"
        )
    if not any(_glob(folder, f"configs/triton_*/{name}") for name in names):
        for path in (path for name in names for level in _LEVELS for path in _glob(folder, level.format(name=name))):
            yield f"{path} is not read: expected it as {folder / 'configs' / 'triton_X_Y_Z' / path.name}"


def _problems_of_spelling(layer: LayerUnderTest, engine: EngineName, folder: Path) -> Iterator[str]:
    """A table that is there under the name that the other engine asks for."""
    key = ENGINES[engine].table_key(layer.shape, layer.gpu.device_name, down=False)
    asked = ENGINES[engine].file_name(key)
    for other in ENGINES.values():
        spelt = other.file_name(key)
        if spelt != asked and (folder / spelt).exists() and not (folder / asked).exists():
            yield (
                f"{folder / spelt} is named as {other.TITLE} does: {ENGINES[engine].TITLE} alone asks for {asked}, and "
                "only a server with the plugin reads both; rename it, or use sglang-moe-ext import"
            )


def _glob(folder: Path, pattern: str) -> list[Path]:
    """The block shape in a file's name is no set of characters."""
    return sorted(folder.glob(pattern.replace("[", "[[]")))
