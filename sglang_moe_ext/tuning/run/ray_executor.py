"""The GPUs of a Ray cluster as executors: an actor each, with a compile pool and a measuring process beside it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglang_moe_ext import __version__
from sglang_moe_ext.core import Failure, GpuError, MoEExtError, Resources
from sglang_moe_ext.tuning.bench.messages import BenchRequest, BenchResult
from sglang_moe_ext.tuning.compile.kernel_source import Job
from sglang_moe_ext.tuning.run.executor import BenchProcessLike, CompilePoolLike, Executor

log = logging.getLogger(__name__)

Make = Callable[[int, Path], tuple[CompilePoolLike, BenchProcessLike]]
"""Called on a node with how many cores are its share, and a folder of its own there. Ray pickles it."""

RAY_HELP = "measure on the GPUs of the Ray cluster that this machine is part of (at ADDRESS, as `ray start` printed it)"

_CALLS_AT_ONCE = 8  # of one actor: who waits for a binary must not keep a request waiting
_PLACED_WITHIN_S = 30.0  # a GPU that Ray has not given by then is in use by another job
_STARTED_WITHIN_S = 600.0
_CLOSED_WITHIN_S = 10.0


def ray_executors(address: str | None, tuned_for: str, make: Make) -> list[Executor]:
    """An executor for each free GPU of the cluster whose device name is `tuned_for`; None: the cluster running here.

    Raises:
        MoEExtError: Ray is not installed, or there is no such cluster.
        GpuError: it has no such GPU, or none that can be used; the message has the reason of each.
    """
    ray = _ray()
    _connect(ray, address)
    seats = [seat for node in ray.nodes() if node["Alive"] for seat in _seats(ray, node)]
    placed = _placed(ray, seats)
    starting = [(seat, seat.actor.start.remote(make, seat.cores)) for seat in placed if isinstance(seat, RayExecutor)]
    started = [_started(seat, result, tuned_for) for seat, result in starting]
    left_out = "; ".join(sorted({why for why in (*placed, *started) if isinstance(why, str)}))
    found = sorted((seat for seat in started if isinstance(seat, RayExecutor)), key=lambda seat: seat.name)
    if not found:
        why = left_out or "it has no GPU at all"
        raise GpuError(f"no GPU of the Ray cluster can be used to tune for {tuned_for}: {why}")
    if left_out:
        log.warning("of the Ray cluster, %d GPUs measure; left out: %s", len(found), left_out)
    return [*found]


@dataclass(frozen=True, slots=True)
class RayExecutor:
    """A GPU of the cluster, and the actor that holds it. `cores`: the GPU's share of its node's."""

    name: str
    actor: Any
    cores: int

    def get_ready(self) -> None:
        """It said what GPU it has before it became an executor."""

    def want(self, jobs: Iterable[Job]) -> None:
        _got(self.name, self.actor.want.remote(list(jobs)))

    def binary(self, job: Job) -> Resources | Failure:
        needs: Resources | Failure = _got(self.name, self.actor.binary.remote(job))
        return needs

    def measure(self, request: BenchRequest) -> BenchResult:
        result: BenchResult = _got(self.name, self.actor.measure.remote(request))
        return result

    def close(self) -> None:
        ray = _ray()
        if ray.is_initialized():  # else the actor ended with the connection
            with contextlib.suppress(MoEExtError):
                _got(self.name, self.actor.close.remote(), _CLOSED_WITHIN_S)
            ray.kill(self.actor)


class _Held:
    """The actor's side: what a GPU of this node needs to measure."""

    def where(self) -> tuple[str, str]:
        """The GPU that Ray gave, and the version of this package on this node."""
        (gpu,) = _ray().get_runtime_context().get_accelerator_ids()["GPU"]
        return gpu, __version__

    def start(self, make: Make, cores: int) -> str:
        """The device name of the GPU."""
        self._open = contextlib.ExitStack()
        folder = self._open.enter_context(tempfile.TemporaryDirectory(prefix="sglang_moe_ext-ray-"))
        self._pool, self._worker = make(cores, Path(folder))
        self._open.callback(self._pool.close)
        self._open.callback(self._worker.close)
        return self._worker.device_name

    def want(self, jobs: list[Job]) -> None:
        self._pool.want(jobs)

    def binary(self, job: Job) -> Resources | Failure:
        return self._pool.result(job)

    def measure(self, request: BenchRequest) -> BenchResult:
        return self._worker.measure(request)

    def close(self) -> None:
        self._open.close()


def _ray() -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing that this package starts reports to anybody
    try:
        import ray
    except ImportError as error:
        raise MoEExtError(f"Ray is not installed ({error}): pip install 'sglang-moe-ext[ray]'") from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    """Join a cluster that runs; never start one."""
    if ray.is_initialized():
        return
    where = address or os.environ.get("RAY_ADDRESS") or "auto"
    if where != "auto":
        _reach(where)
    try:
        ray.init(address=where, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        how = "first run `ray start` on this machine; set RAY_AUTH_MODE=token where the cluster asks for a token"
        raise MoEExtError(f"no Ray cluster can be joined ({where}): {_in_one_line(error)}; {how}") from error


def _reach(address: str) -> None:
    """Ray itself would try for minutes, and then end the process."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        expected = "expected HOST:PORT, as `ray start --head` printed it"
        raise MoEExtError(f"no Ray cluster results at {address!r} ({error}): {expected}") from error


def _seats(ray: Any, node: Mapping[str, Any]) -> list[RayExecutor]:
    """An actor for each GPU of the node, without knowing yet which of them Ray can place."""
    gpus = int(node["Resources"].get("GPU", 0))
    cores = int(node["Resources"].get("CPU", 0)) // gpus if gpus else 0
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    actor = ray.remote(num_gpus=1, num_cpus=cores, max_concurrency=_CALLS_AT_ONCE, scheduling_strategy=here)(_Held)
    return [RayExecutor(node["NodeManagerAddress"], actor.remote(), max(1, cores)) for _ in range(gpus)]


def _placed(ray: Any, seats: list[RayExecutor]) -> list[RayExecutor | str]:
    """Each seat with its GPU in its name, or why it is left out; an actor that nobody holds any more ends."""
    results = [seat.actor.where.remote() for seat in seats]
    if results:
        ray.wait(results, num_returns=len(results), timeout=_PLACED_WITHIN_S)
    return [_named(seat, result) for seat, result in zip(seats, results, strict=True)]


def _named(seat: RayExecutor, result: Any) -> RayExecutor | str:
    try:
        gpu, version = _got(seat.name, result, 0)
    except MoEExtError as error:
        return f"{error} (expected a free GPU, and sglang-moe-ext {__version__} installed, as here)"
    if version != __version__:
        return f"{seat.name} has sglang-moe-ext {version} (expected {__version__}, as here)"
    return replace(seat, name=f"{seat.name} GPU {gpu}")


def _started(seat: RayExecutor, result: Any, tuned_for: str) -> RayExecutor | str:
    try:
        device_name = _got(seat.name, result, _STARTED_WITHIN_S)
        if device_name == tuned_for:
            return seat
        why = f"{seat.name} is {device_name}"
    except MoEExtError as error:
        why = str(error)
    seat.close()
    return why


def _got(name: str, result: Any, timeout_s: float | None = None) -> Any:
    """What the actor returns. Raises MoEExtError where the call failed there, or the actor is gone."""
    ray = _ray()
    try:
        return ray.get(result, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        kind = "" if isinstance(error.cause, MoEExtError) else f"{type(error.cause).__name__}: "
        raise MoEExtError(f"{name}: {kind}{_in_one_line(error.cause)}") from error
    except ray.exceptions.GetTimeoutError as error:
        raise MoEExtError(f"{name}: no result in time") from error
    except ray.exceptions.RayError as error:
        raise MoEExtError(f"{name} is gone: {_in_one_line(error)}") from error


def _in_one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
