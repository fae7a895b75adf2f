"""An overlay of SGLang's tables: a folder with links to all that the engine ships, in which our own tables can lie.

`SGLANG_MOE_CONFIG_DIR` replaces the engine's whole tree, so an overlay must hold that tree too.
"""

from __future__ import annotations

import os
from pathlib import Path

from sglang_moe_ext.core import StoreError
from sglang_moe_ext.engines.sglang import naming

VARIABLE = "SGLANG_MOE_CONFIG_DIR"


def build(overlay: Path, configs_root: Path) -> None:
    """Make, or bring up to date, the overlay of the tables under `configs_root`; what is ours in it stays.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        (overlay / "configs").mkdir(parents=True, exist_ok=True)
        for folder in configs_root.iterdir():
            if folder.is_dir() and naming.is_version_folder(folder.name):
                _link_tables(folder, overlay / "configs" / folder.name)
    except OSError as error:
        raise StoreError(
            f"cannot make the overlay {overlay}: {error.strerror}; set SGLANG_MOE_EXT_STORE elsewhere"
        ) from error


def _link_tables(engines: Path, ours: Path) -> None:
    ours.mkdir(exist_ok=True)
    for table in engines.glob("*.json"):
        link = ours / table.name
        if link.is_symlink() and not link.exists():
            link.unlink()
        if not link.exists():
            os.symlink(table, link)
