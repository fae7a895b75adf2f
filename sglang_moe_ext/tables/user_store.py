"""The user's own store: a copy of every table ever tuned, which no upgrade of an engine takes away."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from sglang_moe_ext import env
from sglang_moe_ext.tables import config_table, files

log = logging.getLogger(__name__)


def root() -> Path:
    """`$SGLANG_MOE_EXT_STORE`, or `sglang_moe_ext` in the user's data folder."""
    if chosen := os.environ.get(env.STORE):
        return Path(chosen)
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(data) / "sglang_moe_ext"


def root_if_any() -> Path | None:
    """`root()`, or None: the user of a container may have no home."""
    try:
        return root()
    except RuntimeError:
        return None


def tables_folder(engine: str, version_folder: str) -> Path:
    """Where the tables for that engine and that Triton lie."""
    return root() / "tables" / engine / version_folder


def all_tables(engine: str) -> Iterator[Path]:
    """Every table of that engine in the store, in order of Triton and name."""
    yield from sorted(
        path for path in (root() / "tables" / engine).glob("triton_*/*.json") if config_table.is_table(path.name)
    )


@contextlib.contextmanager
def locked(folders: Iterable[Path]) -> Iterator[None]:
    """Keep this user's other processes from writing tables there meanwhile; a store that holds no lock stops nobody."""
    with contextlib.ExitStack() as held:
        try:
            place = root() / "locks"
            place.mkdir(parents=True, exist_ok=True)
            # All in one order, so that no two processes wait for each other.
            for name in sorted({hashlib.sha256(os.fsencode(os.path.realpath(it))).hexdigest()[:16] for it in folders}):
                if file := files.hold(place / f"{name}.lock", wait=True):
                    held.enter_context(file)
        except (OSError, RuntimeError) as error:  # the latter where the user has no home
            log.info("tables are written without a lock: %s", error)
        yield
