"""The user's own store: a copy of every table ever tuned, which no upgrade of an engine takes away."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from sglang_moe_ext import env
from sglang_moe_ext.core import StoreError
from sglang_moe_ext.tables import config_table, locks
from sglang_moe_ext.untrusted import show

log = logging.getLogger(__name__)


def root() -> Path:
    """`$SGLANG_MOE_EXT_STORE`, or `sglang_moe_ext` in the user's data folder.

    Raises:
        StoreError: the user has no home, as in a container that is started with --user.
    """
    if chosen := os.environ.get(env.STORE):
        return Path(chosen)
    if data := os.environ.get("XDG_DATA_HOME"):
        return Path(data) / "sglang_moe_ext"
    try:
        return Path.home() / ".local" / "share" / "sglang_moe_ext"
    except RuntimeError as error:
        raise StoreError(f"this user has no home folder for tables: set {env.STORE} to a folder") from error


def root_if_any() -> Path | None:
    """`root()`, or None if the user has no home."""
    try:
        return root()
    except StoreError:
        return None


def tables_folder(engine: str, version_folder: str) -> Path:
    """Where the tables for that engine and that Triton lie."""
    return root() / "tables" / engine / version_folder


def all_tables(engine: str) -> Iterator[Path]:
    """Every table of that engine in the store, in order of Triton and name.

    Raises:
        StoreError: the store cannot be read.
    """
    folder = root() / "tables" / engine
    try:
        versions = [it.path for it in os.scandir(folder) if it.name.startswith("triton_") and it.is_dir()]
        found = [Path(version) / name for version in versions for name in os.listdir(version)]
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise StoreError(
            f"cannot read the store {show(str(folder))}: {error.strerror}; set {env.STORE} to a folder of your own"
        ) from error
    yield from sorted(path for path in found if config_table.is_table(path.name))


@contextlib.contextmanager
def locked(folders: Iterable[Path]) -> Iterator[None]:
    """Keep this user's other processes from writing tables there meanwhile; without a store nothing is held.

    Raises:
        StoreError: another process holds a lock and does not give it back.
    """
    store = root_if_any()
    with contextlib.ExitStack() as held:
        if store is None:
            yield
            return
        try:
            folder = store / "locks"
            folder.mkdir(parents=True, exist_ok=True)
            # All in one order, so that no two processes wait for each other.
            for name in sorted({hashlib.sha256(os.fsencode(os.path.realpath(it))).hexdigest()[:16] for it in folders}):
                held.enter_context(locks.wait_for(folder / f"{name}.lock", what="run this"))
        except OSError as error:
            log.info("tables are written without a lock: %s", show(error))
        yield
