"""The compile pool: makes binaries on all cores in the background, knows what each needs, and makes none twice."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

from sglang_moe_ext.core import Failure, Resources
from sglang_moe_ext.tuning.compile.cache import CompileCache
from sglang_moe_ext.tuning.compile.kernel_source import Compiled, Job, KernelSource, Progress
from sglang_moe_ext.tuning.compile.processes import UNABLE, CompileProcesses

TIMEOUT_S = 60.0
"""One binary takes half a second to four, a badly spilling one under twenty (2 cores, Triton 3.7.1, 2026-11-21)."""
_CLOSED = Failure("Closed", "the compile pool was closed before this was compiled")


class CompilePool:
    """Compiles what is wanted while its callers do other things; any thread may ask. A context, to be closed.

    A failure that `cache` knows is final; a binary that it knows is made again only where `triton_cache` is to have it.
    """

    def __init__(
        self,
        source: KernelSource,
        *,
        cache: CompileCache,
        triton_cache: Path | None = None,
        workers: int | None = None,
        timeout_s: float = TIMEOUT_S,
        progress: Progress = lambda done, of: None,
    ) -> None:
        """`triton_cache`: where Triton keeps the binaries, for processes that launch them; None: thrown away."""
        self._source, self._cache, self._progress = source, cache, progress
        self._makes_binaries = triton_cache is not None
        self._processes = CompileProcesses(source.module, workers or default_workers(), timeout_s, triton_cache)
        # Of the background thread alone:
        self._taken_in: set[Job] = set()
        self._queue: OrderedDict[Job, None] = OrderedDict()
        # Of every thread, under the condition:
        self._changed = threading.Condition()
        self._inbox: list[tuple[Sequence[Job], bool]] = []
        self._results: Compiled = {}
        self._is_closing = False
        self._over: Failure | None = None
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._rope.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="compile pool", daemon=True)
        self._thread.start()

    def want(self, jobs: Iterable[Job], *, first: bool = False) -> None:
        """Queue the jobs that are not known yet; `first`: before all that waits, as also what waits already."""
        wanted = tuple(jobs)
        with self._changed:
            self._inbox.append((wanted, first))
            self._ring()

    def result(self, job: Job) -> Resources | Failure:
        """Wait for the job; it comes before all that waits in the queue and that nobody waits for."""
        with self._changed:
            if job not in self._results:
                self.want([job], first=True)
            self._changed.wait_for(lambda: job in self._results or self._over is not None)
            return self._results.get(job, self._over or _CLOSED)

    @property
    def unable(self) -> Failure | None:
        """Why it compiles nothing any more, which is no job's fault; None while it can, and where it was closed."""
        return self._processes.unable or (None if self._over is _CLOSED else self._over)

    def close(self) -> None:
        """End the workers and what they run, at once; what was not compiled has failed."""
        with self._changed:
            self._is_closing = True
            self._ring()
        self._thread.join()

    def __enter__(self) -> CompilePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ring(self) -> None:
        if self._over is None:
            with contextlib.suppress(BlockingIOError):  # rung often enough to be heard
                self._rope.send(b"!")

    def _run(self) -> None:
        over = Failure(UNABLE, "the compile pool itself failed, with a traceback on stderr")
        try:
            self._take_in()
            while not self._is_closing:
                self._hand_out()
                for job, result in self._processes.finished(self._bell):
                    self._cache.put(self._source, job, result)
                    self._answer({job: result})
                self._queue_again(self._processes.given_back())
                self._take_in()
            over = _CLOSED
        finally:
            with self._changed:
                self._over = over
                self._changed.notify_all()
            self._processes.close()
            self._bell.close()
            self._rope.close()

    def _take_in(self) -> None:
        """To the queue, or answered at once. The bell is hushed before anything is read that it rings for."""
        with contextlib.suppress(BlockingIOError):
            self._bell.recv(4096)
        with self._changed:
            inbox, self._inbox = self._inbox, []
        before = len(self._taken_in)
        known: Compiled = {}
        for jobs, first in inbox:
            for job in reversed(jobs) if first else jobs:
                if job not in self._taken_in:
                    self._taken_in.add(job)
                    if (result := self._known(job)) is not None:
                        known[job] = result
                    else:
                        self._queue[job] = None
                if first and job in self._queue:
                    self._queue.move_to_end(job, last=False)
        if len(self._taken_in) > before:
            self._answer(known)

    def _known(self, job: Job) -> Resources | Failure | None:
        known = self._cache.get(self._source, job)
        return None if isinstance(known, Resources) and self._makes_binaries else known

    def _hand_out(self) -> None:
        while self._queue and (worker := self._processes.free_worker()) is not None:
            self._processes.hand_over(self._queue.popitem(last=False)[0], worker)
        if self._queue and self._processes.unable is not None:
            self._answer(dict.fromkeys(self._queue, self._processes.unable))
            self._queue.clear()

    def _queue_again(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._queue[job] = None
            self._queue.move_to_end(job, last=False)

    def _answer(self, results: Compiled) -> None:
        with self._changed:
            self._results |= results
            self._changed.notify_all()
        self._progress(len(self._results), len(self._taken_in))


def default_workers() -> int:
    """How many binaries are made at once: of the cores that this process may use, which a container's may be few."""
    cores = len(os.sched_getaffinity(0))
    return cores - 1 if cores > 4 else cores  # one to launch kernels with, where it is not missed


def compile_all(
    source: KernelSource,
    jobs: Sequence[Job],
    *,
    cache: CompileCache,
    workers: int | None = None,
    triton_cache: Path | None = None,
    progress: Progress = lambda done, of: None,
) -> Compiled:
    """Compile each job, those in the cache for free. A crash, a hang or an error costs the job that caused it alone.

    `triton_cache`: where Triton keeps the binaries, for a process that will launch them; None: thrown away.
    """
    with CompilePool(source, cache=cache, triton_cache=triton_cache, workers=workers, progress=progress) as pool:
        pool.want(jobs)
        return {job: pool.result(job) for job in jobs}
