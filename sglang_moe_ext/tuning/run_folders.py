"""Where the runs of this user lie, and the lock by which one process at a time holds one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import BinaryIO

from sglang_moe_ext.core import StoreError
from sglang_moe_ext.store import locks, user_store
from sglang_moe_ext.tuning.journal import cannot_write

JOURNAL = "journal.jsonl"
BINARIES = "triton"

_LOCK = "lock"
_NAME = re.compile(r"\d{4}-\d\d-\d\dT\d{6}\.\d{6}Z-[0-9a-f]{8}")


def root() -> Path:
    """The folder of all of them.

    Raises:
        StoreError: the user has no place for it.
    """
    try:
        return user_store.root() / "runs"
    except RuntimeError as error:
        raise StoreError(f"no place for runs: {error} Set {user_store.VARIABLE} to a folder") from error


def newest_first() -> list[Path]:
    """The folders of all runs; what else lies there is none."""
    try:
        return sorted((it for it in root().iterdir() if _NAME.fullmatch(it.name)), reverse=True)
    except OSError:
        return []


def held(folder: Path) -> BinaryIO:
    """The run's lock, held until it is closed.

    Raises:
        StoreError: another holds it, or nobody can.
    """
    try:
        lock = locks.hold(folder / _LOCK, wait=False)
    except OSError as error:
        raise cannot_write(folder / _LOCK, error) from error
    if lock is None:
        raise in_use(folder)
    return lock


def in_use(folder: Path) -> StoreError:
    """The error of a run that another process holds."""
    return StoreError(f"{folder} is being used by another process: wait until it ends, or begin a new run")


def is_held(folder: Path) -> bool:
    """True where another process or another Run holds it, or nobody can."""
    try:
        held(folder).close()
    except StoreError:
        return True
    return False
