"""A process that has imported what every engine imports, from which the children of engine tests are forked.

Importing an engine takes 5 to 8 s of CPU time. 4.5 s of that are torch, transformers and their like, the same for each
release: 0.3 to 1.6 s are left for a child that is forked (SGLang 0.5.23 and 0.5.8, 2026-11-26, two cores). The engine
itself is never imported here, so each child meets its own release, with its own environment, for the first time.

As a script: a fork server on the socket of its first argument, until its stdin and each connection that holds it have
ended. A request is one connection: `request_fork` sends the arguments, environment and open files of a process, and
hears its exit code at its end.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PRELOADED = (
    *("numpy", "torch", "torch._inductor.compile_fx", "torch.ao.quantization", "torchvision", "triton"),
    *(
        "transformers.modeling_utils",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
    ),
    *("fastapi", "openai", "IPython", "xgrammar", "requests", "zmq", "msgspec", "setuptools", "prometheus_client"),
)
QUICK_INTERPRETER = Path(__file__).parents[1] / "kernels" / "quick_interpreter.py"
FORKED_PYTHON = Path(__file__).with_name("forked_python.py")
LONGEST_REQUEST, MOST_FILES = 1 << 20, 64
HOLD, HELD = b"hold", b"held"
SESSION = "TESTS_SESSION_FOLDER"
"""The variable that names a folder which all workers of one run of the tests have in common."""


@contextlib.contextmanager
def session_folder(name: str) -> Iterator[Path]:
    """The folder of that name of this session, which no other process is in meanwhile."""
    folder = Path(os.environ[SESSION], name)
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


class _Client:
    """Has children forked."""

    address: str
    python: Path

    def run(self, arguments: list[str], given: str, environment: dict[str, str], timeout_s: float) -> Any:
        """The finished child: `returncode`, `stdout`, `stderr`.

        Args:
            arguments: as Python's own: a script and what follows, or `-c`, code and what follows.
            given: the child's stdin.

        Raises:
            subprocess.TimeoutExpired: the child took longer, and was killed with all its processes.
        """
        with contextlib.ExitStack() as held:
            files = [held.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(3)]
            files[0].write(given)
            files[0].seek(0)
            descriptors = {number: file.fileno() for number, file in enumerate(files)}
            connection = held.enter_context(request_fork(self.address, arguments, environment, descriptors))
            connection.settimeout(timeout_s)
            try:
                code = exit_code(connection)
            except TimeoutError:
                code = None
            for file in files[1:]:
                file.seek(0)
            out, err = (file.read() for file in files[1:])
        if code is None:
            raise subprocess.TimeoutExpired(arguments, timeout_s, out, err)
        return subprocess.CompletedProcess(arguments, code, out, err)


class JoinedForkServer(_Client):
    """A fork server that another process has started. It lives until this is closed, too."""

    def __init__(self, address: str) -> None:
        """Raises OSError where it has ended."""
        self.address, self.python = address, Path(address).with_name("python")
        self._hold = _connection(address)
        self._hold.send(HOLD)
        if self._hold.recv(64) != HELD:
            raise ConnectionAbortedError(address)

    def close(self) -> None:
        """Let it end where nobody else holds it."""
        self._hold.close()


class ForkServer(_Client):
    """Runs what `python -W ignore ARGUMENTS` would, in children of one process."""

    def __init__(self, environment: Mapping[str, str], python: str | Path = sys.executable) -> None:
        """`environment`: of the imports that all children share; `python`: the interpreter of all."""
        folder = Path(tempfile.mkdtemp(prefix="fork-server-"))
        self.address, self.python = str(folder / "socket"), folder / "python"
        """The second: an executable in the place of the interpreter, see forked_python.py."""
        given = (python, "-I", "-S", FORKED_PYTHON, self.address, environment.get("TRITON_INTERPRET", ""))
        self.python.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, given))} "$0" "$@"\n')
        self.python.chmod(0o755)
        self._process = subprocess.Popen(
            [python, "-W", "ignore", __file__, self.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise AssertionError(f"the fork server ended with exit code {self._process.wait()}")

    @classmethod
    def of_session(
        cls, name: str, environment: Mapping[str, str], python: str | Path = sys.executable
    ) -> ForkServer | JoinedForkServer:
        """The one of that name that any worker has started, where there is one."""
        with session_folder(f"fork-server-{name}") as folder:
            address = folder / "address"
            if address.exists():
                with contextlib.suppress(OSError):  # it ended, since nobody held it
                    return JoinedForkServer(address.read_text())
            started = cls(environment, python)
            address.write_text(started.address)
            return started

    def close(self) -> None:
        """End it where nobody else holds it, and with it what it has not seen the end of."""
        assert self._process.stdin is not None
        self._process.stdin.close()


def request_fork(
    address: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    descriptors: Mapping[int, int],
    executable: str | None = None,
) -> socket.socket:
    """The connection to a new child. It is killed, with its processes, when the connection is closed before its end.

    Args:
        descriptors: the child's own number for each of these files.
        executable: of the child, for processes that it starts itself.
    """
    connection = _connection(address)
    request = {
        "arguments": list(arguments),
        "environment": dict(environment),
        "folder": os.getcwd(),
        "numbers": list(descriptors),
        "executable": executable,
    }
    socket.send_fds(connection, [json.dumps(request).encode()], list(descriptors.values()))
    return connection


def _connection(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LONGEST_REQUEST)
    connection.connect(address)
    return connection


def exit_code(connection: socket.socket) -> int:
    """Of the child, when it ends."""
    return int(connection.recv(64) or -signal.SIGKILL)


def _become(request: dict[str, Any], received: list[int]) -> None:
    """Run what the request names in this process, which was forked for it."""
    os.setsid()
    lowest = max(request["numbers"]) + 1
    moved = [os.dup2(descriptor, lowest + at + max(received)) for at, descriptor in enumerate(received)]
    for number, descriptor in zip(request["numbers"], moved, strict=True):
        os.dup2(descriptor, number)
    for descriptor in {*range(3, lowest)} & {*received} - {*request["numbers"]}:
        os.close(descriptor)
    os.closerange(lowest, max(moved) + 1)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in enumerate(("r", "w", "w")))
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["executable"] is not None:
        sys.executable = request["executable"]
        multiprocessing.set_executable(sys.executable)
    kind, *others = request["arguments"]
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    own = {"-c": "", "-m": os.getcwd()}.get(kind, str(Path(kind).resolve().parent))
    sys.path[:] = [own, *folders, *sys.path[1:]]
    importlib.invalidate_caches()
    if kind == "-c":
        sys.argv = ["-c", *others[1:]]
        exec(compile(others[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = list(others)
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *others]
        runpy.run_path(kind, run_name="__main__")


class _Serving:
    """The children of the process, each with its connection."""

    def __init__(self, address: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(address)
        self.listener.listen(16)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, self.fork)
        self.connections: dict[int, socket.socket] = {}
        self.holders: list[Any] = []
        self.hold(sys.stdin.buffer)

    def until_nobody_holds_it(self) -> dict[str, Any] | None:
        """None then; in a child, at once, what it shall run."""
        while self.holders:
            for key, _ in self.selector.select():
                request: dict[str, Any] | None = key.data()
                if request is not None:
                    return request
        return None

    def hold(self, holder: Any) -> None:
        """Live until this has ended."""
        self.holders.append(holder)
        self.selector.register(holder, selectors.EVENT_READ, lambda: self.release(holder))

    def release(self, holder: Any) -> None:
        self.selector.unregister(holder)
        self.holders.remove(holder)
        holder.close()

    def fork(self) -> dict[str, Any] | None:
        connection, _ = self.listener.accept()
        message, received, _, _ = socket.recv_fds(connection, LONGEST_REQUEST, MOST_FILES)
        if message == HOLD:
            connection.send(HELD)
            self.hold(connection)
        if message in (HOLD, b""):
            return None
        request: dict[str, Any] = json.loads(message)
        if (pid := os.fork()) == 0:
            self.selector.close()
            for theirs in (self.listener, connection, *self.holders, *self.connections.values()):
                theirs.close()
            return request | {"received": received}
        for descriptor in received:
            os.close(descriptor)
        self.connections[pid] = connection
        ends = os.pidfd_open(pid)
        self.selector.register(ends, selectors.EVENT_READ, lambda: self.reap(pid, ends))
        self.selector.register(connection, selectors.EVENT_READ, lambda: self.kill(pid))
        return None

    def kill(self, pid: int) -> None:
        """Nobody waits for it any more."""
        self.selector.unregister(self.connections[pid])
        for end in (os.kill, os.killpg):  # it leads no group yet right after the fork
            with contextlib.suppress(ProcessLookupError):
                end(pid, signal.SIGKILL)

    def reap(self, pid: int, ends: int) -> None:
        self.selector.unregister(ends)
        os.close(ends)
        _, status = os.waitpid(pid, 0)
        connection = self.connections.pop(pid)
        with contextlib.suppress(KeyError):
            self.selector.unregister(connection)
        with connection, contextlib.suppress(OSError):
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())


def main() -> None:
    """Serve until nobody holds it."""
    for name in PRELOADED:
        importlib.import_module(name)
    if os.environ.get("TRITON_INTERPRET") == "1":
        runpy.run_path(str(QUICK_INTERPRETER))["quicken"]()
    gc.freeze()
    serving = _Serving(sys.argv[1])
    print("ready", flush=True)
    if (request := serving.until_nobody_holds_it()) is None:
        shutil.rmtree(Path(sys.argv[1]).parent)
    else:
        _become(request, request.pop("received"))


if __name__ == "__main__":
    main()
