"""Time launches on the GPU: cold L2 before each one, and no launch overhead inside the events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from sglang_moe_ext.gpu import specs

Launch = Callable[[int], object]
"""Queues one launch; its argument is the number of the turn, by which inputs take turns."""

_FLUSHES = 2.2  # times the L2 that is written before each launch
_LEAST_BUSY_CYCLES = 100_000  # about 50 us
_MOST_BUSY_CYCLES = _LEAST_BUSY_CYCLES << 9  # about 30 ms: no launcher takes that long, so something else is wrong


class CudaEvent(Protocol):
    """A point in the GPU's queue, as torch.cuda.Event has it."""

    def record(self) -> None:
        """Queue it."""

    def query(self) -> bool:
        """True where the GPU has come to it."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from here to there, once the GPU has passed both."""


@dataclass(frozen=True, slots=True)
class LaunchQueue:
    """What a stopwatch asks of a GPU. `sleep` takes clock cycles; `flush` makes the L2 cold; a test passes a fake."""

    event: Callable[[], CudaEvent]
    sleep: Callable[[int], object]
    flush: Callable[[], object]
    synchronize: Callable[[], object]


def cuda_queue(device: str = "cuda") -> LaunchQueue:
    """The current stream of that GPU. Holds twice its L2 in memory."""
    import torch

    written = torch.empty(int(_cache_bytes(device) * _FLUSHES), dtype=torch.int8, device=device)
    return LaunchQueue(
        event=partial(torch.cuda.Event, enable_timing=True),
        sleep=torch.cuda._sleep,
        flush=written.zero_,
        synchronize=torch.cuda.synchronize,
    )


def _cache_bytes(device: str) -> int:
    """The L2; on an AMD GPU the larger cache of the memory behind it, where its record has one."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    l2_bytes = int(properties.L2_cache_size)
    if torch.version.hip is None:
        return l2_bytes
    known = specs.describe(torch.cuda.get_device_name(device), properties)
    return max(l2_bytes, int(known.l2_mib * 2**20))


class Stopwatch:
    """Samples of device time, in microseconds.

    The GPU is kept busy until a launch is queued. All samples of a call stand behind the same wait, since the wait is
    felt in them: the L2 writes back meanwhile what the flush has left in it. Where a launch comes too late twice, the
    call begins anew behind a longer wait, which later calls keep: one stopwatch for each kind of launcher.
    """

    def __init__(self, queue: LaunchQueue) -> None:
        self._queue = queue
        self._busy_cycles = 0

    def rounds(
        self, launches: Sequence[Launch], turns: Sequence[int], meanwhile: Callable[[], None] | None = None
    ) -> list[list[float]]:
        """Microseconds of each launch in each turn, round-robin, so that a drift of the clocks meets all alike.

        `meanwhile` is called when all is queued and the GPU still at it.

        Raises:
            RuntimeError: a launch came too late behind the longest wait.
        """
        while (events := self._queued(launches, turns)) is None:
            self._wait_longer()
        if meanwhile is not None:
            meanwhile()
        self._queue.synchronize()
        return [[begin.elapsed_time(end) * 1e3 for begin, end in of_turn] for of_turn in events]

    def _queued(
        self, launches: Sequence[Launch], turns: Sequence[int]
    ) -> list[list[tuple[CudaEvent, CudaEvent]]] | None:
        """Events around each launch in each turn; None where one came too late."""
        events: list[list[tuple[CudaEvent, CudaEvent]]] = []
        for turn in turns:
            events.append([])
            for launch in launches:
                # Late once may be the host's doing: it took the CPU away.
                around = self._around(launch, turn) or self._around(launch, turn)
                if around is None:
                    return None
                events[-1].append(around)
        return events

    def _around(self, launch: Launch, turn: int) -> tuple[CudaEvent, CudaEvent] | None:
        """Events around one launch; None where the GPU got there first, and has waited for the launch."""
        queue = self._queue
        begin, end = queue.event(), queue.event()
        queue.flush()
        if self._busy_cycles:
            queue.sleep(self._busy_cycles)
        begin.record()
        launch(turn)
        end.record()
        return None if begin.query() else (begin, end)

    def _wait_longer(self) -> None:
        if self._busy_cycles >= _MOST_BUSY_CYCLES:
            self._busy_cycles = 0  # the next launches are not to pay for this one
            raise RuntimeError(
                f"the launch took longer than {_MOST_BUSY_CYCLES:,} cycles of the GPU, about 30 ms: "
                "the machine is too busy to time on"
            )
        self._busy_cycles = max(_LEAST_BUSY_CYCLES, 2 * self._busy_cycles)
