"""Start a server as a process group, wait until it is healthy, and end it with all of its children."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.e2e import supervised
from sglang_moe_ext.e2e.client import Client
from sglang_moe_ext.engines.server_log import LONGEST_LINE, Said, read_log
from sglang_moe_ext.untrusted import show

HOST = "127.0.0.1"
_POLL_S, _LEAVE_S = 0.2, 20.0
_TAIL_LINES, _TAIL_BYTES = 4, 1 << 16
_LOG_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Server:
    """One that is healthy. `start_s`: from its start until then; `pid`: the leader of its session."""

    client: Client
    log: Path
    start_s: float
    pid: int

    def said(self) -> Said:
        """By its log so far."""
        return said_by(self.log)


def said_by(log: Path) -> Said:
    """What a server's log says; of a very long one, its beginning."""
    with log.open("rb") as file:
        return read_log(file.read(_LOG_BYTES).decode("utf-8", errors="replace"))


@contextlib.contextmanager
def running(
    command: Sequence[str],
    variables: Mapping[str, str],
    log: Path,
    client_of: Callable[[str], Client],
    *,
    start_s: float,
    life_s: float,
    folder: Path | None = None,
) -> Iterator[Server]:
    """A healthy server; it and all of its children are gone afterwards, and at the latest after `life_s`.

    Args:
        command: of the server, before the flag of its port.
        variables: its environment.
        client_of: from its address to its client.
        start_s: how long it may take until it is healthy.

    Raises:
        EngineError: it ends, or takes too long, before it is healthy.
    """
    port = free_port()
    begun = time.monotonic()
    process = _start([*command, "--port", str(port)], variables, log, life_s, folder)
    try:
        client = client_of(f"http://{HOST}:{port}")
        while not client.is_healthy():
            if process.poll() is not None:
                raise EngineError(f"the server ended with status {process.returncode}: {_tail(log)}")
            if time.monotonic() - begun > start_s:
                raise EngineError(f"the server is not healthy after {start_s:.0f} s: {_tail(log)}")
            time.sleep(_POLL_S)
        yield Server(client, log, time.monotonic() - begun, process.pid)
    finally:
        _end(process)


def _start(
    command: Sequence[str], variables: Mapping[str, str], log: Path, life_s: float, folder: Path | None
) -> subprocess.Popen[bytes]:
    try:
        out = log.open("wb")
    except OSError as error:
        raise EngineError(f"cannot write {show(str(log))}: {error.strerror}; choose another --output-dir") from error
    watched = [sys.executable, "-W", "ignore", "-m", supervised.__name__, str(os.getpid()), f"{max(life_s, 1):.0f}"]
    with out:
        return subprocess.Popen(
            [*watched, *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=dict(variables),
            cwd=folder,
            start_new_session=True,
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the group, and wait until none of it is left: the next server needs its memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + _LEAVE_S
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < until:
            os.killpg(process.pid, 0)
            time.sleep(_POLL_S)


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return show(" | ".join(line[:LONGEST_LINE] for line in lines[-_TAIL_LINES:]) or "it said nothing", 2000)


def free_port() -> int:
    """One below 30000, to which the engines add up to 10000 for ports of their own."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = random.randrange(20_000, 30_000)
            probe.bind((HOST, port))
            return port
