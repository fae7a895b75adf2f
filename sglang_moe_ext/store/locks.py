"""A lock between processes: a file that one of them holds; it is free again when that one closes it or ends."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import BinaryIO


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
