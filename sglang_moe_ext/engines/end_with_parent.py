"""End a child process, with all that it runs, when the process that started it ends, however that ends."""

from __future__ import annotations

import os
import select
import signal
import threading
import time

_POLL_S = 0.2


def end_with_parent(pid: int) -> None:
    """Kill this process and its group once the process `pid` is gone. Call it in the leader of a group.

    A child that is importing an engine reads no pipe for seconds, and so does not notice a closed one.
    """
    threading.Thread(target=_watch, args=(pid,), name="end with parent", daemon=True).start()


def _watch(pid: int) -> None:
    try:
        select.select([os.pidfd_open(pid)], [], [])
    except ProcessLookupError:
        pass
    except OSError:  # an old kernel, or a sandbox without pidfd_open
        while _is_there(pid):
            time.sleep(_POLL_S)
    os.killpg(0, signal.SIGKILL)


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
