"""One GPU in a process of its own: what breaks there breaks a measurement, not the run."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sglang_moe_ext.core import PROJECTIONS, Failure, MoEExtError, MoEShape, Projection, TileConfig

log = logging.getLogger(__name__)

_FATAL = "CudaError"
"""Kind of a failure after which the process can do nothing more on the GPU, and ends itself."""

Pair = dict[Projection, TileConfig]
"""The configurations of the up and the down GEMM; they share one BLOCK_SIZE_M."""


@dataclass(frozen=True, slots=True)
class Screen:
    """Time one configuration of one GEMM a few times. Answered by microseconds, or a Failure."""

    tokens: int
    projection: Projection
    config: TileConfig
    samples: int


@dataclass(frozen=True, slots=True)
class Race:
    """Time pairs in turn. Answered by the microseconds of each pair, up and down together, in each round."""

    tokens: int
    pairs: tuple[Pair, ...]
    rounds: int


@dataclass(frozen=True, slots=True)
class Check:
    """Compare a pair's results with the reference: fresh inputs, poisoned outputs. Answered by the larger error."""

    tokens: int
    pair: Pair


@dataclass(frozen=True, slots=True)
class Setup:
    """What the worker measures, and where Triton finds the binaries that are already made."""

    shape: MoEShape
    seed: int
    triton_cache: Path


class _Bench:
    """The worker's side: a layer, a stopwatch, and an answer to each kind of request."""

    def __init__(self, setup: Setup) -> None:
        from sglang_moe_ext.engines.sglang import kernel
        from sglang_moe_ext.tuning.layer import Layer
        from sglang_moe_ext.tuning.timing import Stopwatch

        self.setup = setup
        self.layer = Layer(kernel.load(), setup.shape, setup.seed)
        self.stopwatch = Stopwatch()
        self._batch = self.layer.batch(1, setup.seed)

    def answer(self, request: Screen | Race | Check) -> object:
        match request:
            case Screen():
                return self._screen(request)
            case Race():
                return self._race(request)
            case Check():
                return self._check(request)

    def _batch_of(self, tokens: int) -> Any:
        if self._batch.tokens != tokens:
            self._batch = self.layer.batch(tokens, self.setup.seed)
        return self._batch

    def _launch(self, batch: Any, projection: Projection, config: TileConfig) -> Callable[[int], None]:
        from sglang_moe_ext.engines.sglang import kernel
        from sglang_moe_ext.tuning.layer import ROUTINGS

        layer = self.layer
        tensors = [layer.gemm(batch, projection, config.block_m, turn) for turn in range(ROUTINGS)]

        def launch(turn: int) -> None:
            kernel.launch(layer.engine, layer.shape, projection, tensors[turn % ROUTINGS], config)

        return launch

    def _screen(self, request: Screen) -> list[float]:
        launch = self._launch(self._batch_of(request.tokens), request.projection, request.config)
        launch(0)
        return [us for (us,) in self.stopwatch.rounds([launch], request.samples)]

    def _race(self, request: Race) -> list[list[float]]:
        batch = self._batch_of(request.tokens)
        launches = [
            self._launch(batch, projection, pair[projection]) for pair in request.pairs for projection in PROJECTIONS
        ]
        for launch in launches:
            launch(0)
        times = self.stopwatch.rounds(launches, request.rounds)
        return [
            [of_round[2 * pair] + of_round[2 * pair + 1] for of_round in times] for pair in range(len(request.pairs))
        ]

    def _check(self, request: Check) -> float:
        from sglang_moe_ext.kernels.reference import relative_error

        batch = self.layer.batch(request.tokens, self.setup.seed + 1)
        errors = []
        for projection in PROJECTIONS:
            batch.out[projection].fill_(float("nan"))
            self._launch(batch, projection, request.pair[projection])(0)
            errors.append(relative_error(batch.out[projection], self.layer.expected(batch, projection, 0)))
        return max(errors)


def _serve(connection: Connection, setup: Setup) -> None:
    """Answer requests until the other side closes. What the GPU cannot forget ends the process."""
    os.environ["TRITON_CACHE_DIR"] = str(setup.triton_cache)
    logging.disable(logging.WARNING)
    import torch

    try:
        bench = _Bench(setup)
    except Exception as error:  # noqa: BLE001 - the parent reports it in one line
        connection.send(Failure(type(error).__name__, str(error)))
        return
    connection.send(torch.cuda.get_device_name(0))
    with contextlib.suppress(EOFError):
        while True:
            request = connection.recv()
            try:
                answer = bench.answer(request)
                torch.cuda.synchronize()
            except Exception as error:  # noqa: BLE001 - a candidate can fail in any way; the parent records which
                message = (str(error).splitlines() or [""])[0][:300]
                if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.cuda.OutOfMemoryError):
                    connection.send(Failure(_FATAL, message))
                    return
                connection.send(Failure(type(error).__name__, message))
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    torch.cuda.empty_cache()
            else:
                connection.send(answer)


class Worker:
    """The parent's side: ask, and get an answer or a Failure, whatever happens to the process."""

    def __init__(self, setup: Setup, *, start_timeout_s: float = 300.0, timeout_s: float = 120.0) -> None:
        self._setup, self._start_timeout_s, self._timeout_s = setup, start_timeout_s, timeout_s
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._setup), daemon=True)
        self._process.start()
        theirs.close()
        answer = self._received(self._start_timeout_s)
        if isinstance(answer, Failure):
            self.close()
            raise MoEExtError(f"the measuring process did not start: {answer.kind}: {answer.message}")

    def _received(self, timeout_s: float) -> Any:
        try:
            if self._connection.poll(timeout_s):
                return self._connection.recv()
            return Failure("Timeout", f"no answer within {timeout_s:.0f} s")
        except (EOFError, ConnectionError):
            self._process.join(5)
            return Failure("Crash", f"the measuring process died with exit code {self._process.exitcode}")

    def ask(self, request: Screen | Race | Check) -> Any:
        """The answer to the request; a Failure costs this request alone."""
        if not self._process.is_alive():
            self._start()
        try:
            self._connection.send(request)
        except ConnectionError:
            return Failure("Crash", "the measuring process died")
        answer = self._received(self._timeout_s)
        if isinstance(answer, Failure) and answer.kind in ("Timeout", "Crash", _FATAL):
            log.warning("%s: starting the measuring process again", answer.message)
            self.close()
        return answer

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(1)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
