"""The workers of the compile pool: how many there are, what each does, and what became of it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

from sglang_moe_ext import env
from sglang_moe_ext.core import CompileJob, Failure, Resources
from sglang_moe_ext.tuning.compile.kernel_source import Job
from sglang_moe_ext.tuning.compile.worker import CompileChild, ForkServer, ended

log = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0
"""An engine is imported in 7 to 15 s once its files are in memory, and in minutes from a slow disk."""
BINARIES_A_WORKER = 100
"""After 100 a worker has grown from 360 MB of its own to 550, after 280 to 640; a fresh one starts at 360 again, and
its first binary takes up to a second more than the next (SGLang 0.5.23, sm_90, Triton 3.7.1, 2026-11-21)."""

UNABLE = "CompilePoolUnable"
"""Kind of the failure of every job where nothing can be compiled: it says nothing of the job."""
Finished = list[tuple[Job, Resources | Failure]]


class CompileProcesses:
    """The workers, with one job each at a time: what a job does to its worker costs that job alone. For one thread.

    A fork_server that is killed is started once more; what was being compiled is given back then.
    """

    def __init__(self, module: str, size: int, timeout_s: float, triton_cache: Path | None) -> None:
        self.unable: Failure | None = None
        """Why there are no workers, and will be none; of no job's making."""
        self._given_back: list[Job] = []
        self._has_lost_a_fork_server = False
        self._module, self._size, self._timeout_s = module, size, timeout_s
        self._scratch = tempfile.TemporaryDirectory(prefix="sglang_moe_ext-", ignore_cleanup_errors=True)
        self._environment = {
            "TRITON_CACHE_DIR": str(triton_cache or Path(self._scratch.name, "triton")),
            "TMPDIR": self._scratch.name,  # what a killed compiler leaves there goes with the pool
            env.DISABLE: "1",  # what is compiled is what was asked for, not what our guard makes of it
        }
        self._fork_server: ForkServer | None = None
        self._has_imported = False
        self._import_deadline = 0.0
        self._workers: list[CompileChild] = []

    def free_worker(self) -> CompileChild | None:
        """One without a job, forked if there may be one more; the first call starts the fork_server."""
        if self.unable is not None:
            return None
        try:
            if self._fork_server is None:
                self._import_deadline = time.monotonic() + START_TIMEOUT_S
                self._fork_server = ForkServer(self._module, {**os.environ, **self._environment}, self._timeout_s)
            free = next((worker for worker in self._workers if worker.job is None), None)
            if free is None and self._has_imported and len(self._workers) < self._size:
                free = self._fork_server.fork()
                self._workers.append(free)
            return free
        except (ConnectionError, TimeoutError):
            return None  # the fork_server is lost: `finished` sees it too
        except OSError as error:
            self._size = len(self._workers)
            log.warning("no more than %d processes can compile: %s", self._size, error)
            if not self._size:
                self._give_up(f"no process can be started to compile in: {error}")
            return None

    def hand_over(self, job: Job, worker: CompileChild) -> None:
        worker.job, worker.deadline = job, time.monotonic() + self._timeout_s
        with contextlib.suppress(ConnectionError):  # it has just died: `finished` sees it too
            worker.connection.send(job)

    def finished(self, bell: socket.socket) -> Finished:
        """Wait until a job has ended or the bell rings: the jobs that have ended."""
        deadlines = [worker.deadline for worker in self._workers if worker.job is not None]
        controls = [] if self._fork_server is None else [self._fork_server.control]
        is_importing = self._fork_server is not None and not self._has_imported
        if is_importing:
            deadlines.append(self._import_deadline)
        patience_s = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        heard = wait([bell, *controls, *(worker.connection for worker in self._workers)], patience_s)
        now = time.monotonic()
        finished: Finished = []
        for worker in list(self._workers):
            if worker.connection in heard:
                finished += self._answered(worker)
            elif worker.job is not None and worker.deadline <= now:
                self._bury(worker)
                finished += _failed(worker, "Timeout", f"not compiled within {self._timeout_s:g} s")
        if any(control in heard for control in controls):
            finished += self._hear_of_fork_server()
        elif is_importing and self._import_deadline <= now:
            finished += self._give_up(f"{self._module} was not imported within {START_TIMEOUT_S:g} s")
        return finished

    def _answered(self, worker: CompileChild) -> Finished:
        try:
            result = worker.connection.recv()
        except (EOFError, OSError):
            return _failed(worker, "Crash", f"the compiler {ended(self._bury(worker))}")
        assert worker.job is not None
        finished: Finished = [(worker.job, result)]
        worker.job = None
        worker.compiled += 1
        if worker.compiled >= BINARIES_A_WORKER:
            self._bury(worker)
        return finished

    def given_back(self) -> list[Job]:
        """Jobs that were handed over, and are to be handed over again."""
        jobs, self._given_back = self._given_back, []
        return jobs

    def _hear_of_fork_server(self) -> Finished:
        assert self._fork_server is not None
        try:
            failure = self._fork_server.import_failure()
        except (ConnectionError, TimeoutError):
            return self._lose_fork_server(self._fork_server.kill())
        self._has_imported = True
        return [] if failure is None else self._give_up(f"{failure.kind}: {failure.message}")

    def _lose_fork_server(self, exit_code: int) -> Finished:
        how = f"the process that imports {self._module} to compile with {ended(exit_code)}"
        if exit_code >= 0 or self._has_lost_a_fork_server:
            return self._give_up(how)
        log.warning("%s: starting it once more", how)
        self._has_lost_a_fork_server = True
        self._given_back += self._end_all()
        return []

    def _bury(self, worker: CompileChild) -> int:
        """End the worker, if it has not ended, with all that it runs: its exit code."""
        self._workers.remove(worker)
        worker.kill()
        try:
            return self._fork_server.reap(worker) if self._fork_server is not None else -signal.SIGKILL
        except OSError:
            return -signal.SIGKILL  # the fork_server is lost: `finished` sees it too

    def _give_up(self, why: str) -> Finished:
        """End every process at once; what was being compiled fails for that reason."""
        self.unable = Failure(UNABLE, why)
        return [(job, self.unable) for job in self._end_all()]

    def _end_all(self) -> list[Job]:
        """The jobs that were being compiled."""
        for worker in self._workers:
            worker.kill()
        jobs = [worker.job for worker in self._workers if worker.job is not None]
        for worker in list(self._workers):
            self._bury(worker)
        if self._fork_server is not None:
            self._fork_server.kill()
        self._fork_server, self._has_imported = None, False
        return jobs

    def close(self) -> None:
        self._end_all()
        self._scratch.cleanup()


def _failed(worker: CompileChild, kind: str, message: str) -> Finished:
    if worker.job is None:
        return []
    log.warning("%s: %s: left out", _name(worker.job), message)
    return [(worker.job, Failure(kind, message))]


def _name(job: Job) -> object:
    return job.key if isinstance(job, CompileJob) else job.config
