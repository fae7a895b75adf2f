"""One GPU with its compiler: everything that a search strategy works with."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from sglang_moe_ext.core import Failure, GpuError, MoEExtError, Resources
from sglang_moe_ext.tuning.bench.messages import BenchRequest, BenchResult
from sglang_moe_ext.tuning.compile.kernel_source import Job


class Executor(Protocol):
    """A GPU of this machine or of another. Not thread-safe: one thread at a time measures."""

    @property
    def name(self) -> str:
        """Its name in messages: `GPU 1`, `10.0.0.3 GPU 1`."""

    def get_ready(self) -> None:
        """Wait until it can measure.

        Raises:
            MoEExtError: it cannot be started.
        """

    def want(self, jobs: Iterable[Job]) -> None:
        """Queue these for compilation; does not wait."""

    def binary(self, job: Job) -> Resources | Failure:
        """The resources of the binary; waits until it is compiled."""

    def measure(self, request: BenchRequest) -> BenchResult:
        """Measure. A Failure costs this request alone.

        Raises:
            MoEExtError: the GPU does not respond any more.
        """

    def close(self) -> None:
        """End its own processes; what it shares stays open."""


class CompilePoolLike(Protocol):
    """What an executor needs of a compile pool."""

    def want(self, jobs: Iterable[Job], *, first: bool = False) -> None: ...

    def result(self, job: Job) -> Resources | Failure: ...

    def close(self) -> None: ...


class BenchProcessLike(Protocol):
    """What an executor needs of a measuring process; `device_name` as torch.cuda reports it."""

    @property
    def device_name(self) -> str: ...

    def measure(self, request: BenchRequest) -> BenchResult: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class LocalExecutor:
    """A GPU of this machine. All executors here share the pool; its owner closes it."""

    name: str
    pool: CompilePoolLike
    worker: BenchProcessLike

    def get_ready(self) -> None:
        self.worker.device_name  # noqa: B018 - waits for the process

    def want(self, jobs: Iterable[Job]) -> None:
        self.pool.want(jobs)

    def binary(self, job: Job) -> Resources | Failure:
        return self.pool.result(job)

    def measure(self, request: BenchRequest) -> BenchResult:
        return self.worker.measure(request)

    def close(self) -> None:
        self.worker.close()


log = logging.getLogger(__name__)

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called by the caller's own thread with how many tasks are done, of how many."""
GPUS_HELP = "GPUs to measure on: all, or their indices as in 0,2 (4 is the one GPU of index 4); default 0"


def run_tasks(executors: Sequence[Executor], tasks: Sequence[Callable[[Executor], T]], progress: Progress) -> list[T]:
    """Results in the order of the tasks, whichever executor did which; give the longest tasks first.

    The task of an executor that does not respond any more goes to the others, which begin it again. Closes no
    executor: a caller that is interrupted here must close them, which ends what they do.

    Raises:
        MoEExtError: no executor is left.
    """
    if not executors:
        raise MoEExtError("there is no GPU to measure on")
    progress(0, len(tasks))
    if len(executors) > 1:
        return _on_threads(executors, tasks, progress)
    results: list[T] = []
    for task in tasks:
        results.append(task(executors[0]))
        progress(len(results), len(tasks))
    return results


def close_all(executors: Sequence[Executor]) -> None:
    """Close them all at the same time: each may take a second to end."""
    with ThreadPoolExecutor(len(executors) or 1) as threads:
        closing = [threads.submit(executor.close) for executor in executors]
    for closed in closing:
        closed.result()


class _StoppedError(Exception):
    """Unwinds a task whose result is not needed any more."""


@dataclass(slots=True)
class _Watched:
    """An executor as a task sees it: records its end, and measures nothing once the run has stopped."""

    name: str
    executor: Executor
    stop: threading.Event
    end: MoEExtError | None = None

    def get_ready(self) -> None:
        self._noting(self.executor.get_ready)

    def want(self, jobs: Iterable[Job]) -> None:
        self._noting(lambda: self.executor.want(jobs))

    def binary(self, job: Job) -> Resources | Failure:
        return self._noting(lambda: self.executor.binary(job))

    def measure(self, request: BenchRequest) -> BenchResult:
        return self._noting(lambda: self.executor.measure(request))

    def close(self) -> None:
        self.executor.close()

    def _noting(self, call: Callable[[], T]) -> T:
        try:
            result = None if self.stop.is_set() else [call()]
        except MoEExtError as error:
            self.end = error
            raise
        if result is None or self.stop.is_set():  # a failure during the close is not the candidate's
            raise _StoppedError
        return result[0]


@dataclass(frozen=True, slots=True)
class _Done(Generic[T]):
    place: int
    result: T


@dataclass(frozen=True, slots=True)
class _Ended:
    place: int
    executor: str
    error: MoEExtError


@dataclass(slots=True)
class _Shared(Generic[T]):
    """What the threads of the executors and the caller's thread have in common."""

    tasks: Sequence[Callable[[Executor], T]]
    todo: queue.PriorityQueue[int] = field(default_factory=queue.PriorityQueue)
    events: queue.SimpleQueue[_Done[T] | _Ended | BaseException] = field(default_factory=queue.SimpleQueue)
    stop: threading.Event = field(default_factory=threading.Event)


def _on_threads(executors: Sequence[Executor], tasks: Sequence[Callable[[Executor], T]], progress: Progress) -> list[T]:
    shared = _Shared(tasks)
    for place in range(len(tasks)):
        shared.todo.put(place)
    try:
        for executor in executors:  # daemons: an interpreter that ends must not wait for a GPU
            threading.Thread(target=_serve, args=(executor, shared), name=executor.name, daemon=True).start()
        done = _collected(shared, len(executors), progress)
    finally:
        shared.stop.set()
        for _ in executors:
            shared.todo.put(0)  # wakes who waits for a task
    return [done[place] for place in range(len(tasks))]


def _collected(shared: _Shared[T], working: int, progress: Progress) -> dict[int, T]:
    """The result of each place, from so many executors that work."""
    done: dict[int, T] = {}
    while len(done) < len(shared.tasks):
        match shared.events.get():
            case _Done(place, result):
                done[place] = result
                progress(len(done), len(shared.tasks))
            case _Ended(place, name, end):
                working -= 1
                if working == 0:
                    raise end
                log.warning("%s results no more (%s): its task goes to the %d left", name, end, working)
                shared.todo.put(place)
            case error:
                raise error
    return done


def _serve(executor: Executor, shared: _Shared[T]) -> None:
    """One executor's thread: the next task that is left, until there is none, or the executor ends."""
    while True:
        place = shared.todo.get()
        if shared.stop.is_set():
            return
        watched = _Watched(executor.name, executor, shared.stop)
        try:
            event: _Done[T] | BaseException = _Done(place, shared.tasks[place](watched))
        except BaseException as error:  # noqa: BLE001 - a task fails in any way; the caller's thread raises it
            event = error
        if watched.end is not None:  # whatever the task made of it
            shared.events.put(_Ended(place, executor.name, watched.end))
            return
        shared.events.put(event)


def visible_gpus(
    wanted: str | None, tuned_for: str, device_names: Sequence[str], environment: Mapping[str, str] = os.environ
) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is to say in each measuring process; None means the first GPU.

    `device_names`: of every GPU that this process sees, as torch.cuda reports them, in its order.

    Raises:
        GpuError: `wanted` makes no sense, or names a GPU that is not there or not the one tuned for.
    """
    given = environment.get("CUDA_VISIBLE_DEVICES")
    ids = map(str, range(len(device_names))) if given is None else given.split(",")
    there = list(zip(ids, device_names, strict=False))  # CUDA itself stops at an entry that it does not know
    if not there:
        why = "" if given is None else f": CUDA_VISIBLE_DEVICES is {given!r}"
        raise GpuError(f"no GPU is visible here{why}; expected at least one {tuned_for}")
    places = list(range(len(there))) if wanted == "all" else _indices("0" if wanted is None else wanted, len(there))
    others = [f"GPU {place} is {there[place][1]}" for place in places if there[place][1] != tuned_for]
    if others:
        fitting = ",".join(str(place) for place, (_, name) in enumerate(there) if name == tuned_for)
        instead = f"--gpus {fitting}" if fitting else "another --gpu"
        raise GpuError(f"{', '.join(others)}: expected {tuned_for}, which this run tunes for; give {instead}")
    return [there[place][0].strip() for place in places]


def _indices(wanted: str, visible: int) -> list[int]:
    words = [word.strip() for word in wanted.split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) < 6 for word in words):
        raise GpuError(f"--gpus {wanted!r} makes no sense: expected all, or indices as in 0,2")
    indices = [int(word) for word in words]
    if len(set(indices)) < len(indices):
        raise GpuError(f"--gpus {wanted!r} names a GPU twice: expected each index once")
    if max(indices) >= visible:
        raise GpuError(f"GPU {max(indices)} is not visible here: expected all, or indices below {visible}")
    return indices
