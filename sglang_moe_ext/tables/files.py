"""Whole files: written atomically, so that a reader sees the old one or the new one; read without trust."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sglang_moe_ext.core import StoreError, TableError
from sglang_moe_ext.untrusted import show


def write_together(contents: Mapping[Path, str], pairs: Iterable[tuple[Path, Path]] = ()) -> None:
    """Write each file whole. All are on disk before the first takes its name, so a full disk changes nothing.

    `pairs`: tables of the up and the down projection, of which a reader must never see one old and one new. The old
    down table is set aside before the new up table takes its name: an up table alone is sound.

    Raises:
        StoreError: a folder cannot be made or written; the message names it, the reason, and the way round.
    """
    staged: dict[Path, str] = {}
    downs = [down for up, down in pairs if up in contents and down in contents]
    path = Path()
    try:
        for path, text in contents.items():
            staged[path] = stage(path, text.encode())
        for path in filter(os.path.lexists, downs):
            os.replace(path, set_aside(path))
        for path in sorted(staged, key=downs.__contains__):
            os.replace(staged[path], path)
        for path in downs:
            set_aside(path).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"cannot write {show(str(path))}: {error.strerror}; make room, or choose another place with --output-dir"
        ) from error
    finally:
        for temporary in staged.values():
            if os.path.exists(temporary):
                os.unlink(temporary)


_OURS = "sglang_moe_ext"
_STAGED = re.compile(rf"\.{_OURS}\.(?P<namespace>\d+)\.(?P<process>\d+)\.\w+\.tmp")
_FORGOTTEN_S = 24 * 3600.0
"""After so long, a staged file of a process of another container is taken for left over."""


def stage(path: Path, data: bytes) -> str:
    """Write the bytes beside their final place and flush them; the name tells which process wrote it.

    Raises:
        OSError: the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{_OURS}.{_process_namespace()}.{os.getpid()}."
    descriptor, temporary = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
    except OSError:
        os.unlink(temporary)
        raise
    return temporary


def _process_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def remove_leftovers(folder: Path) -> None:
    """Remove the files that killed processes of this package left in that folder, and no others."""
    try:
        found = [(entry, match) for entry in os.scandir(folder) if (match := _STAGED.fullmatch(entry.name))]
    except OSError:
        return
    for entry, match in found:
        with contextlib.suppress(OSError):
            is_here = int(match["namespace"]) == _process_namespace()
            is_old = time.time() - entry.stat(follow_symlinks=False).st_mtime > _FORGOTTEN_S
            if is_old or (is_here and not os.path.exists(f"/proc/{match['process']}")):
                os.unlink(entry.path)


def set_aside(table: Path) -> Path:
    """The name of a down table while the up table beside it is replaced."""
    return table.with_name(f".{_OURS}.{table.name}.old")


def tables_set_aside(folder: Path) -> list[Path]:
    """The down tables of that folder that a killed process set aside, by the names that they had."""
    prefix, suffix = f".{_OURS}.", ".old"
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    ours = (name for name in names if name.startswith(prefix) and name.endswith(suffix))
    return sorted(folder / name.removeprefix(prefix).removesuffix(suffix) for name in ours)


_MOST_BYTES = 4 * 1024 * 1024
"""Of a table, or of its provenance."""


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

    A lock file is never deleted while others may wait for it: they would hold a file that no other process sees.

    Raises:
        OSError: its folder is missing or cannot be written, or its disk knows no locks.
    """
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except BaseException:  # an interrupt as well: no caller could close the file
        file.close()
        raise
    return file
