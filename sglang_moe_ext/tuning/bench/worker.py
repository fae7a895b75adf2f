"""A process of its own for one GPU: what breaks there costs one question, not the run."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, Protocol

from sglang_moe_ext import env
from sglang_moe_ext.core import Failure, MoEExtError
from sglang_moe_ext.tuning.bench.messages import (
    BenchGemm,
    BenchKernelPlan,
    BenchLayers,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
)

log = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0
TIMEOUTS_S: Mapping[type[BenchRequest], float] = {
    BenchGemm: 60.0,
    BenchKernelPlan: 180.0,
    BenchLayers: 300.0,
    CheckAccuracy: 300.0,
}
"""Seconds are enough, but for whole layers of many tokens on a slow GPU; a kernel that hangs takes for ever."""
_FATAL = "CudaError"
"""Kind of a failure after which the process can do nothing more on the GPU, and ends itself."""
_STARTS = 3
"""A process that dies before its first answer is started so often."""
_CLOSED = Failure("Interrupted", "the measuring process was closed")
_UNSEEN = Failure("Crash", "the measuring process died before it saw the question")


class BenchLike(Protocol):
    """What answers in the process. `device_name`: the GPU that it answers for.

    It may have `is_well() -> bool`, False where everything fails from now on: asked after each question that raised.
    """

    device_name: str

    def answer(self, question: BenchRequest) -> BenchResult:
        """May raise anything: the question is answered by a Failure then."""


def _failure(error: Exception) -> Failure:
    return Failure(type(error).__name__, (str(error).strip().splitlines() or ["no message"])[0][:300])


def _is_fatal(error: Exception, bench: BenchLike) -> bool:
    """True where CUDA answers everything with that error from now on; not every library says so by its class."""
    import torch

    if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return not getattr(bench, "is_well", lambda: True)()


def _serve(connection: Connection, make: Callable[[], BenchLike], environment: Mapping[str, str]) -> None:
    """Answer questions until the other side closes. What the GPU cannot forget ends the process."""
    os.environ.update(environment)
    os.environ[env.DISABLE] = "1"  # what is measured is what was asked for, not what our guard makes of it
    os.setsid()  # Ctrl-C is the parent's to handle
    logging.basicConfig(level=logging.ERROR, format="%(message)s")  # of the engine and its libraries
    logging.getLogger("sglang_moe_ext").setLevel(logging.WARNING)
    try:
        bench = make()
    except Exception as error:  # noqa: BLE001 - the parent reports it in one line
        connection.send(_failure(error))
        return
    connection.send(bench.device_name)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            question = connection.recv()
            try:
                answer = bench.answer(question)
            except Exception as error:  # noqa: BLE001 - a candidate can fail in any way; the parent records which
                if _is_fatal(error, bench):
                    connection.send(Failure(_FATAL, _failure(error).message))
                    return
                answer = _failure(error)
            connection.send(answer)


class BenchProcess:
    """The parent's side: ask, and get an answer or a Failure, whatever happens to the process.

    The process starts at once, and in the background; the first question waits for it.
    """

    def __init__(
        self,
        make: Callable[[], BenchLike],
        environment: Mapping[str, str] | None = None,
        *,
        start_timeout_s: float = START_TIMEOUT_S,
        timeout_s: float | None = None,
    ) -> None:
        """`make` is called in the process, under `environment` beside our own; both go there by pickle.

        `timeout_s` None: TIMEOUTS_S.
        """
        self._make, self._environment = make, environment or {}
        self._start_timeout_s, self._timeout_s = start_timeout_s, timeout_s
        self._asking = threading.Lock()
        self._starting_or_closing = threading.Lock()
        self._is_closed = False
        self._device_name: str | None = None
        self._start()

    def _start(self) -> None:
        with self._starting_or_closing:
            if self._is_closed:  # nobody would end the process
                raise MoEExtError(_CLOSED.message)
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._make, self._environment), daemon=True)
            self._process.start()
            theirs.close()
            self._is_ready = False

    def _received(self, timeout_s: float) -> Any:
        try:
            if self._connection.poll(timeout_s):
                return self._connection.recv()
            return Failure("Timeout", f"no answer within {timeout_s:.0f} s")
        except ConnectionError:  # the kernel's word for a process that left unread what it was sent
            return _UNSEEN
        except EOFError:
            self._process.join(5)
            return Failure("Crash", f"the measuring process died with exit code {self._process.exitcode}")

    def _get_ready(self) -> None:
        """Raises MoEExtError where the process does not come up."""
        if self._is_ready and self._process.is_alive():
            return
        if self._is_ready:
            self._end()
        for _ in range(_STARTS):
            if self._connection.closed:
                self._start()
            said = self._received(self._start_timeout_s)
            if not isinstance(said, Failure):
                self._device_name, self._is_ready = said, True
                return
            self._end()
            if said.kind != "Crash":
                break
        raise MoEExtError(f"the measuring process did not start: {said.kind}: {said.message}")

    @property
    def device_name(self) -> str:
        """The GPU that it measures on; waits for the process.

        Raises:
            MoEExtError: the process does not start.
        """
        with self._asking:
            self._get_ready()
            return self._device_name or ""

    def ask(self, question: BenchRequest) -> BenchResult:
        """The answer to the question; a Failure costs this question alone. Interrupted where another thread closes.

        Raises:
            MoEExtError: the process does not start any more.
        """
        with self._asking:
            try:
                answer = self._asked(question)
                if answer is _UNSEEN:  # whatever ended the process, this candidate did not
                    answer = self._asked(question)
            except MoEExtError:
                if not self._is_closed:
                    raise
                return _CLOSED
            return _CLOSED if self._is_closed and isinstance(answer, Failure) else answer

    def _asked(self, question: BenchRequest) -> BenchResult:
        self._get_ready()
        try:
            self._connection.send(question)
            answer: BenchResult = self._received(self._timeout_s or TIMEOUTS_S[type(question)])
        except ConnectionError:
            answer = _UNSEEN
        if isinstance(answer, Failure) and answer.kind in ("Timeout", "Crash", _FATAL):
            self._end()
            self._start()
            log.warning("%s: starting the measuring process again", answer.message)
        return answer

    def _end(self) -> None:
        self._connection.close()
        self._process.join(0.5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def close(self) -> None:
        """End the process, whatever it does; any thread may."""
        with self._starting_or_closing:
            self._is_closed = True
            self._process.kill()
        with self._asking:  # who asks has just heard that the process died
            self._end()
