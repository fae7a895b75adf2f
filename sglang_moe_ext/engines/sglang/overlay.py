"""An overlay of SGLang's tables: a folder with links to all that the engine ships, in which our own tables can lie.

`SGLANG_MOE_CONFIG_DIR` replaces the engine's whole tree, so an overlay must hold that tree too.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from sglang_moe_ext.core import StoreError
from sglang_moe_ext.engines.sglang import table_names as sglang_table_names
from sglang_moe_ext.engines.sglang.installation import SglangInstallation
from sglang_moe_ext.tables import user_store


def overlay_folder(engine: SglangInstallation) -> Path:
    """Where that engine's overlay lies: in the user's store, one for each release."""
    return user_store.root() / "overlay" / f"sglang-{engine.version_text}"


def build(overlay: Path, configs_root: Path) -> None:
    """Make, or bring up to date, the overlay of the tables under `configs_root`; what is ours in it stays.

    Raises:
        StoreError: it cannot be written, or a server could not read it.
    """
    try:
        (overlay / "configs").mkdir(parents=True, exist_ok=True)
        for folder in configs_root.iterdir():
            if folder.is_dir() and sglang_table_names.is_version_folder(folder.name):
                _link_tables(folder, overlay / "configs" / folder.name)
        odd = [
            path
            for path in (overlay / "configs").glob("triton_*")
            if not sglang_table_names.is_version_folder(path.name)
        ]
    except OSError as error:
        raise StoreError(
            f"cannot make the overlay {overlay}: {error.strerror}; set SGLANG_MOE_EXT_STORE elsewhere"
        ) from error
    if odd:
        raise StoreError(
            f"{odd[0]} is named after no release of Triton: since 0.5.12 that ends SGLang's lookup; move it away"
        )


def _link_tables(engines: Path, ours: Path) -> None:
    ours.mkdir(exist_ok=True)
    for link in ours.iterdir():
        if link.is_symlink() and not link.exists():  # of an engine that lay elsewhere, or had more tables
            link.unlink(missing_ok=True)
    for table in engines.glob("*.json"):
        with contextlib.suppress(FileExistsError):
            os.symlink(table, ours / table.name)
