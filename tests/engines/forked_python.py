"""In the place of the interpreter: has a fork server run what `python -W ignore ...` is told to run.

Arguments: the address of a fork server, its $TRITON_INTERPRET, the path of the stand-in, and those of `python`. The
child has this process's open files, environment and folder, and its exit code becomes ours; it is killed where this
process ends first. Anything but `-W ignore -m MODULE` or `-W ignore -c CODE`, interpreted as the fork server is, is run
by the real interpreter.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from fork_server import exit_code, request_fork  # type: ignore[import-not-found]  # this runs with -I -S


def main(address: str, interpret: str, executable: str, arguments: list[str]) -> int:
    asked = (
        arguments[1:] if arguments[:1] == ["-Wignore"] else arguments[2:] if arguments[:2] == ["-W", "ignore"] else []
    )
    if asked[:1] not in (["-c"], ["-m"]) or os.environ.get("TRITON_INTERPRET", "") != interpret:
        os.execv(sys.executable, [sys.executable, *arguments])
    files = {number: number for number in inherited()}
    with request_fork(address, asked, os.environ, files, executable) as connection:
        code: int = exit_code(connection)
    if code < 0:
        os.kill(os.getpid(), -code)
    return code


def inherited() -> list[int]:
    """The files that were open before this process opened its own."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            is_inherited = os.get_inheritable(int(name))
        except OSError:  # the listing's own
            continue
        if is_inherited:
            found.append(int(name))
    return found


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4], sys.argv[4:]))
