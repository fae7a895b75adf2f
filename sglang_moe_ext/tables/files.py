"""Whole files: written atomically, so that a reader sees the old one or the new one; read without trust."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sglang_moe_ext.core import StoreError, TableError
from sglang_moe_ext.untrusted import show


def write_together(contents: Mapping[Path, str]) -> None:
    """Write each file whole. All are on disk before the first takes its name, so a full disk changes nothing.

    Raises:
        StoreError: a folder cannot be made or written; the message names it, the reason, and the way round.
    """
    staged: list[tuple[str, Path]] = []
    path = Path()
    try:
        for path, text in contents.items():
            staged.append((_stage(path, text), path))
        for temporary, path in staged:
            os.replace(temporary, path)
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror}; make room, or choose another place with --output-dir"
        ) from error
    finally:
        for temporary, _ in staged:
            if os.path.exists(temporary):
                os.unlink(temporary)


def _stage(path: Path, text: str) -> str:
    """Write the text beside its final place and flush it to the disk; the name starts with a dot and ends in .tmp."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
    except OSError:
        os.unlink(temporary)
        raise
    return temporary


_MOST_BYTES = 4 * 1024 * 1024
"""Of a table, or of what is known of one."""


def read_bounded(path: Path) -> bytes:
    """What the file holds; files come from anywhere, and a server reads them as it starts.

    Raises:
        OSError: it cannot be read, or is a pipe or a device, which would have the server wait.
        TableError: it is too large for what it should be.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise TableError(
            f"{show(str(path))} is larger than {_MOST_BYTES} bytes: expected a table of kernel configurations"
        )
    return data


def read_json(path: Path) -> Any:
    """The document in a file that comes from anywhere, read as the engines do: UTF-8 without a byte order mark.

    Raises:
        TableError: it cannot be read, or is no JSON; the message names the file.
    """
    return _parse(path, _read(path))


_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_json_with_mark(path: Path) -> tuple[Any, bool]:
    """The same, and whether a byte order mark stands before it, which the engines cannot read."""
    data = _read(path)
    return _parse(path, data.removeprefix(_BYTE_ORDER_MARK)), data.startswith(_BYTE_ORDER_MARK)


def _read(path: Path) -> bytes:
    try:
        return read_bounded(path)
    except OSError as error:
        raise TableError(f"cannot read table {show(str(path))}: {error.strerror}") from error


def _parse(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise TableError(f"{show(str(path))} is not valid JSON ({show(error)}): delete it or tune again") from error


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def is_writable(folder: Path) -> bool:
    """True where a file could be made in that folder, or in the nearest of its parents that exists."""
    try:
        existing = next(place for place in (folder, *folder.parents) if place.exists())
    except OSError:
        return False
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def hold(path: Path, *, wait: bool) -> BinaryIO | None:
    """The file, made where it is missing, held until it is closed. None where another holds it and `wait` is off.

    A lock file is never deleted while others may wait for it: they would hold one that nobody else sees.

    Raises:
        OSError: its folder is missing or cannot be written, or its disk knows no locks.
    """
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except BaseException:  # an interrupt as well: nobody else can close the file
        file.close()
        raise
    return file
