"""The measuring process of one GPU: a failure there costs one request, not the run."""

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
from sglang_moe_ext.engines.end_with_parent import end_with_parent
from sglang_moe_ext.tuning.bench.messages import BenchRequest, BenchResult

log = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0
_FATAL = "CudaError"
"""Kind of the failure after which the process cannot use the GPU any more and ends itself."""
_STARTS = 3
"""How often a process is started that dies before its first result."""
_CLOSED = Failure("Interrupted", "the measuring process was closed")
_UNSEEN = Failure("Crash", "the measuring process died before it saw the request")


class BenchLike(Protocol):
    """The object in the process that measures. `device_name`: its GPU.

    It may have `is_well() -> bool`, False where every further request would fail; called after a request that raised.
    """

    device_name: str

    def measure(self, request: BenchRequest) -> BenchResult:
        """May raise anything; the result is a Failure then."""


def _failure(error: Exception) -> Failure:
    return Failure(type(error).__name__, (str(error).strip().splitlines() or ["no message"])[0][:300])


def _is_fatal(error: Exception, bench: BenchLike) -> bool:
    """True where every further CUDA call fails too. Not every library raises AcceleratorError then."""
    import torch

    if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return not getattr(bench, "is_well", lambda: True)()


def _serve(connection: Connection, make: Callable[[], BenchLike], environment: Mapping[str, str], parent: int) -> None:
    """Serve requests until the other side closes. An error that the CUDA context keeps ends the process."""
    os.environ.update(environment)
    os.environ[env.DISABLE] = "1"  # the guard must not change what is measured
    os.setsid()  # Ctrl-C is the parent's to handle
    end_with_parent(parent)
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
            request = connection.recv()
            try:
                result = bench.measure(request)
            except Exception as error:  # noqa: BLE001 - a candidate can fail in any way; the parent records which
                if _is_fatal(error, bench):
                    connection.send(Failure(_FATAL, _failure(error).message))
                    return
                result = _failure(error)
            connection.send(result)


class BenchProcess:
    """The parent's side: each request has a result or a Failure, whatever happens to the process.

    The process starts at once and in the background; the first request waits for it.
    """

    def __init__(
        self,
        make: Callable[[], BenchLike],
        environment: Mapping[str, str] | None = None,
        *,
        start_timeout_s: float = START_TIMEOUT_S,
        timeout_s: float | None = None,
    ) -> None:
        """`make` is called in the process, with `environment` added to its variables; both are pickled.

        `timeout_s` None: each request's own TIME_LIMIT_S.
        """
        self._make, self._environment = make, environment or {}
        self._start_timeout_s, self._timeout_s = start_timeout_s, timeout_s
        self._measuring = threading.Lock()
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
            self._process = context.Process(
                target=_serve, args=(theirs, self._make, self._environment, os.getpid()), daemon=True
            )
            self._process.start()
            theirs.close()
            self._is_ready = False

    def _received(self, timeout_s: float) -> Any:
        try:
            if self._connection.poll(timeout_s):
                return self._connection.recv()
            return Failure("Timeout", f"no result within {timeout_s:.0f} s")
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
        with self._measuring:
            self._get_ready()
            return self._device_name or ""

    def measure(self, request: BenchRequest) -> BenchResult:
        """The result. A Failure concerns this request alone; its kind is Interrupted where another thread closes.

        Raises:
            MoEExtError: the process cannot be started again.
        """
        with self._measuring:
            try:
                result = self._measure(request)
                if result is _UNSEEN:  # this candidate did not end the process
                    result = self._measure(request)
            except MoEExtError:
                if not self._is_closed:
                    raise
                return _CLOSED
            return _CLOSED if self._is_closed and isinstance(result, Failure) else result

    def _measure(self, request: BenchRequest) -> BenchResult:
        self._get_ready()
        try:
            self._connection.send(request)
            result: BenchResult = self._received(self._timeout_s or request.TIME_LIMIT_S)
        except ConnectionError:
            result = _UNSEEN
        if isinstance(result, Failure) and result.kind in ("Timeout", "Crash", _FATAL):
            self._end()
            self._start()
            log.warning("%s: starting the measuring process again", result.message)
        return result

    def _end(self) -> None:
        self._connection.close()
        self._process.join(0.5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def close(self) -> None:
        """Kill the process. Any thread may call this."""
        with self._starting_or_closing:
            self._is_closed = True
            self._process.kill()
        with self._measuring:  # a waiting request has just failed
            self._end()
