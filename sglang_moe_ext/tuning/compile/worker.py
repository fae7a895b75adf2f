"""The processes that compile: a fork server that imports the kernel once, and the workers forked from it.

The fork server answers on one socket: a descriptor asks for a worker that serves it, a pid asks how that worker ended.
The standard library's fork server does not fit: a process has one, with the kernel and the environment first asked
for; an import that hangs there cannot be ended; and each fork runs the caller's main module again.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from sglang_moe_ext.core import Failure, Resources
from sglang_moe_ext.engines.end_with_parent import end_with_parent
from sglang_moe_ext.tuning.compile.kernel_source import Job

ANSWER_S = 30.0
"""A fork or a burial takes milliseconds; longer, and the fork_server is taken for lost."""


class CompileChild:
    """The pool's hold on one worker and on the job that it was given."""

    def __init__(self, pid: int, connection: Connection) -> None:
        self.pid, self.connection = pid, connection
        self.job: Job | None = None
        self.deadline = 0.0
        self.compiled = 0

    def kill(self) -> None:
        """End the worker and the assembler that it may run. Its pid is its own until the fork_server has reaped it."""
        self.connection.close()
        for end in (os.kill, os.killpg):  # it leads no group yet right after the fork
            with contextlib.suppress(ProcessLookupError):
                end(self.pid, signal.SIGKILL)


class ForkServer:
    """The pool's hold on the fork_server. ConnectionError or TimeoutError from any method: the fork_server is lost."""

    def __init__(self, module: str, environment: Mapping[str, str], timeout_s: float) -> None:
        self._module = module
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        """Readable once the kernel is imported or has failed to be; after that, once the fork_server is lost."""
        self.control.settimeout(ANSWER_S)
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; "
            f"main({module!r}, {theirs.fileno()}, {timeout_s!r}, {os.getpid()})"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what an engine prints is not to end up in the answer of a command
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,  # Ctrl-C is the caller's to handle
            )

    def import_failure(self) -> Failure | None:
        """What the fork_server says when it is through with its import."""
        said = json.loads(self._heard())
        return None if said is None else Failure(said[0], f"{self._module} cannot be imported: {said[1]}")

    def fork(self) -> CompileChild:
        """Raises: OSError where the machine has no room for one more process."""
        ours, theirs = Pipe()
        with theirs:
            socket.send_fds(self.control, [b"fork"], [theirs.fileno()])
            pid = int(self._heard())
        if pid < 0:
            ours.close()
            raise OSError(-pid, os.strerror(-pid))
        return CompileChild(pid, ours)

    def reap(self, worker: CompileChild) -> int:
        """The exit code of a worker that was killed or has died: negative for a signal."""
        self.control.send(str(worker.pid).encode())
        return int(self._heard())

    def _heard(self) -> bytes:
        try:
            message = self.control.recv(8192)
        except TimeoutError:
            self.control.shutdown(socket.SHUT_RDWR)  # whatever it says now is no answer to what it is asked next
            raise
        if not message:
            raise ConnectionResetError("the fork_server is lost")
        return message

    def kill(self) -> int:
        """End it, if it has not ended, with what an import may run: its exit code. Its workers are to go before."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self.control.close()
        return self._process.wait()


def ended(exit_code: int) -> str:
    """In words."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    hint = ", perhaps for want of memory" if exit_code == -signal.SIGKILL else ""
    return f"was ended by signal {-exit_code} ({signal.strsignal(-exit_code)}){hint}"


def main(module: str, control_descriptor: int, timeout_s: float, parent: int) -> None:
    """Run the fork server: send null or why the kernel cannot be imported, then fork and reap until the pool ends."""
    end_with_parent(parent)
    control = socket.socket(fileno=control_descriptor)
    try:
        importlib.import_module(module).warm_up()
        unable = None
    except Exception as error:  # noqa: BLE001 - an engine fails to import in any way; the pool reports it
        unable = [type(error).__name__, _message(error)]
    with contextlib.suppress(ConnectionError):  # the pool is no more
        control.send(json.dumps(unable).encode())
        while True:
            message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
            if descriptors:
                control.send(str(_forked(module, control, descriptors[0], timeout_s, parent)).encode())
            elif message:
                _, status = os.waitpid(int(message), 0)
                control.send(str(os.waitstatus_to_exitcode(status)).encode())
            else:
                return


def _forked(module: str, control: socket.socket, descriptor: int, timeout_s: float, parent: int) -> int:
    try:
        pid = os.fork()
    except OSError as error:
        pid = -(error.errno or errno.EAGAIN)
    if pid:
        os.close(descriptor)
        return pid
    exit_code = 1
    try:
        os.setsid()  # the head of a group, so that one signal ends it and the assembler that it runs
        end_with_parent(parent)
        control.close()
        os.set_inheritable(descriptor, False)
        _compile_what_comes(module, Connection(descriptor), timeout_s)
        exit_code = 0
    finally:
        os._exit(exit_code)  # what the fork_server has set up is not the worker's to take down


def _compile_what_comes(module: str, pool: Connection, timeout_s: float) -> None:
    with contextlib.suppress(EOFError, ConnectionError):  # the pool is no more
        while True:
            job = pool.recv()
            signal.alarm(int(2 * timeout_s) + 1)  # the pool ends what hangs, as long as there is one
            pool.send(_compiled(module, job))
            signal.alarm(0)


def _compiled(module: str, job: Job) -> Resources | Failure:
    try:
        answer: Resources | Failure = importlib.import_module(module).compile_job(job)
        return answer
    except Exception as error:  # noqa: BLE001 - a compiler fails in any way; each costs this job alone
        return Failure(type(error).__name__, _message(error))


def _message(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[-1][:300]
