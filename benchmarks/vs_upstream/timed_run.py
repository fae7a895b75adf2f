"""Run a command as a user would, and note when it said what."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_POLL_S = 0.5
_LEAVE_S = 10.0
"""What a command that is stopped has to end what it started."""
_LINE_ENDS = re.compile(r"[\r\n]+")


@dataclass(frozen=True, slots=True)
class Line:
    """What it said, and how many seconds after the start it had said it."""

    at_s: float
    text: str


@dataclass(frozen=True, slots=True)
class Run:
    """A command that ended after `seconds`, or was stopped then: `status` is None."""

    seconds: float
    status: int | None
    lines: tuple[Line, ...]

    @property
    def last_words(self) -> str:
        return next((line.text for line in reversed(self.lines) if line.text.strip()), "it said nothing")


def timed(command: Sequence[str], environment: Mapping[str, str], folder: Path, limit_s: float | None = None) -> Run:
    """Run it in that folder, output and errors together and shown on our standard error; stop it after `limit_s`."""
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    heard = _Heard()
    status: int | None = None
    try:
        while (left_s := _POLL_S if limit_s is None else started + limit_s - time.monotonic()) > 0:
            if _hear(process, min(left_s, _POLL_S), heard, started):
                status = process.wait()
                break
        seconds = time.monotonic() - started
    finally:
        _stop(process)
    return Run(seconds, status, heard.all())


class _Heard:
    """Cuts output into lines as it comes. A bar starts its lines with \\r, so an open line has been said already."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._lines: list[Line] = []
        self._open = Line(0.0, "")

    def add(self, data: bytes, at_s: float) -> None:
        text = self._decoder.decode(data)
        print(text, end="", file=sys.stderr, flush=True)
        more, *lines = _LINE_ENDS.split(text)
        if more:
            self._open = Line(at_s, self._open.text + more)
        for line in lines:
            self._lines.append(self._open)
            self._open = Line(at_s, line)

    def all(self) -> tuple[Line, ...]:
        if self._open.text:
            print(file=sys.stderr)
        return tuple(line for line in (*self._lines, self._open) if line.text)


def _hear(process: subprocess.Popen[bytes], wait_s: float, heard: _Heard, started: float) -> bool:
    """Take what it says within that time; true where it has ended."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], wait_s)
    if not ready:
        return process.poll() is not None  # what it left running may hold the pipe open
    data = os.read(process.stdout.fileno(), 1 << 16)
    heard.add(data, time.monotonic() - started)
    return not data


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End it and what it started, if it has not ended by itself."""
    assert process.stdout is not None
    process.stdout.close()
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_LEAVE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
