"""Locks between processes of one user: held while tables are written, waited for with one line, and not for ever."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import BinaryIO

from sglang_moe_ext.core import StoreError
from sglang_moe_ext.tables import files
from sglang_moe_ext.untrusted import show

log = logging.getLogger(__name__)

SAY_AFTER_S, GIVE_UP_AFTER_S = 5.0, 60.0
"""Tables are written in milliseconds."""
_TRY_EVERY_S = 0.01


def wait_for(path: Path, *, what: str) -> BinaryIO:
    """The lock file, held until it is closed.

    Raises:
        OSError: its folder is missing or cannot be written, or its disk knows no locks.
        StoreError: another process holds it for longer than anything takes.
    """
    started, is_said = time.monotonic(), False
    while (file := files.hold(path, wait=False)) is None:
        waited = time.monotonic() - started
        if waited > GIVE_UP_AFTER_S:
            raise StoreError(
                f"another process has held the lock {show(str(path))} for {GIVE_UP_AFTER_S:.0f} s: end it (`fuser -v` "
                f"names it), then {what} again"
            )
        if waited > SAY_AFTER_S and not is_said:
            is_said = True
            log.warning("waiting for another process that holds the lock %s", show(str(path)))
        time.sleep(_TRY_EVERY_S)
    return file
