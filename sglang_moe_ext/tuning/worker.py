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

from sglang_moe_ext.core import Failure, MoEExtError
from sglang_moe_ext.tuning.questions import Answer, Question

log = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0
TIMEOUT_S = 60.0
"""A question takes seconds at most, the first one of a batch size included; a kernel that hangs takes for ever."""
_FATAL = "CudaError"
"""Kind of a failure after which the process can do nothing more on the GPU, and ends itself."""
_STARTS = 3
"""A process that dies before its first answer is started so often."""


class Bench(Protocol):
    """What answers in the process. `device_name`: the GPU that it answers for."""

    device_name: str

    def answer(self, question: Question) -> Answer:
        """May raise anything: the question is answered by a Failure then."""


def _failure(error: Exception) -> Failure:
    return Failure(type(error).__name__, (str(error).strip().splitlines() or ["no message"])[0][:300])


def _is_fatal(error: Exception) -> bool:
    """True where CUDA answers everything with that error from now on."""
    import torch

    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.cuda.OutOfMemoryError)


def _serve(connection: Connection, make: Callable[[], Bench], environment: Mapping[str, str]) -> None:
    """Answer questions until the other side closes. What the GPU cannot forget ends the process."""
    os.environ.update(environment)
    os.setsid()  # Ctrl-C is the parent's to handle
    logging.disable(logging.WARNING)
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
                if _is_fatal(error):
                    connection.send(Failure(_FATAL, _failure(error).message))
                    return
                answer = _failure(error)
            connection.send(answer)


class Worker:
    """The parent's side: ask, and get an answer or a Failure, whatever happens to the process.

    The process starts at once, and in the background; the first question waits for it.
    """

    def __init__(
        self,
        make: Callable[[], Bench],
        environment: Mapping[str, str] | None = None,
        *,
        start_timeout_s: float = START_TIMEOUT_S,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`make` is called in the process, under `environment` beside our own; both go there by pickle."""
        self._make, self._environment = make, environment or {}
        self._start_timeout_s, self._timeout_s = start_timeout_s, timeout_s
        self._asking = threading.Lock()
        self._device_name: str | None = None
        self._start()

    def _start(self) -> None:
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
        except (EOFError, ConnectionError):
            self._process.join(5)
            return Failure("Crash", f"the measuring process died with exit code {self._process.exitcode}")

    def _get_ready(self) -> None:
        """Raises MoEExtError where the process does not come up."""
        for _ in range(_STARTS):
            if self._is_ready and self._process.is_alive():
                return
            if self._is_ready:
                self._end()
                self._start()
            said = self._received(self._start_timeout_s)
            if not isinstance(said, Failure):
                self._device_name, self._is_ready = said, True
                return
            self._end()
            if said.kind != "Crash":
                break
            self._start()
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

    def ask(self, question: Question) -> Answer:
        """The answer to the question; a Failure costs this question alone.

        Raises:
            MoEExtError: the process does not start any more.
        """
        with self._asking:
            self._get_ready()
            try:
                self._connection.send(question)
            except ConnectionError:
                return Failure("Crash", "the measuring process died")
            answer: Answer = self._received(self._timeout_s)
            if isinstance(answer, Failure) and answer.kind in ("Timeout", "Crash", _FATAL):
                log.warning("%s: starting the measuring process again", answer.message)
                self._end()
                self._start()
            return answer

    def _end(self) -> None:
        self._connection.close()
        self._process.join(0.5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._end()
