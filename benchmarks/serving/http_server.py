"""A real SGLang HTTP server, stock or with the plugin, as a process group that is ended with all of its children."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.children import environment
from benchmarks.serving.http_client import Client
from sglang_moe_ext.core import EngineError

START_S = 240.0
FLAGS = (
    *("--load-format", "dummy", "--host", "127.0.0.1", "--random-seed", "0", "--log-level", "info"),
    *("--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *("--moe-runner-backend", "triton", "--mem-fraction-static", "0.8", "--disable-radix-cache"),
    *("--cuda-graph-max-bs-decode", "64"),
)
"""No cache of prefixes, and CUDA graphs of decode steps up to the largest batch that is measured; those of prefill are
the server's own. `tools/pack_engine.sh` leaves FlashAttention out, so that attention is Triton's."""
CHECKOUT = Path(__file__).parents[2]
_POLL_S, _LEAVE_S = 0.2, 20.0
_ACTIVE = "is active in SGLang"
_TOLD = ("sglang-moe-ext", "MoE kernel config", "sub-optimal")
_WRONG = ("Traceback", " ERROR ", "Error:", "CUDA error", "out of memory")
_MOST_LINES, _LONGEST_LINE = 12, 400
_TAIL_LINES = 4
_STAMP = re.compile(r".*\[\d{4}-\d\d-\d\d [^\]]*\] ")
"""A progress bar, which ends no line, may stand before it."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a server's log has of the plugin and of tables, and of errors; each line once, without its time."""

    is_active: bool
    tables: tuple[str, ...]
    errors: tuple[str, ...]


def read_log(text: str) -> Said:
    """Of the whole log."""
    lines = list(dict.fromkeys(_STAMP.sub("", line.strip())[:_LONGEST_LINE] for line in text.splitlines()))
    return Said(
        any(_ACTIVE in line for line in lines),
        tuple(line for line in lines if any(words in line for words in _TOLD))[:_MOST_LINES],
        tuple(line for line in lines if any(words in line for words in _WRONG))[:_MOST_LINES],
    )


@dataclass(frozen=True, slots=True)
class Server:
    """One that is healthy. `start_s`: from its start until then."""

    client: Client
    log: Path
    start_s: float

    def said(self) -> Said:
        """By its log so far."""
        return read_log(self.log.read_text(encoding="utf-8", errors="replace"))


@dataclass(frozen=True, slots=True)
class Launch:
    """How servers are started: the command before the flag of its port, what is first on PYTHONPATH, and the limit."""

    command: tuple[str, ...]
    site: Path
    folder: Path
    life_s: float
    start_s: float = START_S

    def environment(self, *, stock: bool) -> dict[str, str]:
        """Of a server without or with the plugin, which both find by the metadata in `site`."""
        inherited = os.environ.get("PYTHONPATH")
        path = os.pathsep.join([str(self.site), str(CHECKOUT), *([inherited] if inherited else [])])
        return environment(stock=stock, more={"PYTHONPATH": path})


def command_of(model: Path, more: Sequence[str] = ()) -> tuple[str, ...]:
    """Of a server of that model folder."""
    return (sys.executable, "-W", "ignore", "-m", "sglang.launch_server", "--model-path", str(model), *FLAGS, *more)


@contextlib.contextmanager
def running(launch: Launch, log: Path, *, stock: bool) -> Iterator[Server]:
    """A healthy server; it and all of its children are gone afterwards, and at the latest after `life_s`.

    Raises:
        EngineError: it ends, or takes too long, before it is healthy.
    """
    port = _free_port()
    begun = time.monotonic()
    process = _start([*launch.command, "--port", str(port)], launch, launch.environment(stock=stock), log)
    try:
        client = Client(port)
        while not client.is_healthy():
            if process.poll() is not None:
                raise EngineError(f"the server ended with status {process.returncode}: {_tail(log)}")
            if time.monotonic() - begun > launch.start_s:
                raise EngineError(f"the server is not healthy after {launch.start_s:.0f} s: {_tail(log)}")
            time.sleep(_POLL_S)
        yield Server(client, log, time.monotonic() - begun)
    finally:
        _end(process)


def _start(command: Sequence[str], launch: Launch, variables: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(
            ["timeout", "-s", "KILL", f"{max(launch.life_s, 1):.0f}", *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=dict(variables),
            cwd=launch.folder,
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
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " | ".join(line[:_LONGEST_LINE] for line in lines[-_TAIL_LINES:]) or "it said nothing"


def _free_port() -> int:
    """One below 30000, to which the engine adds up to 10000 for ports of its own."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = random.randrange(20_000, 30_000)
            probe.bind(("127.0.0.1", port))
            return port
