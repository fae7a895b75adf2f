"""Time launches on the GPU: cold L2 before each one, and no launch overhead inside the events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Launch = Callable[[int], object]
"""Queues one launch; its argument is the number of the turn, by which inputs take turns."""

_FLUSHES = 2.2  # times the L2 that is written before each launch
_LEAST_BUSY_CYCLES = 100_000  # about 50 us
_MOST_BUSY_CYCLES = 50_000_000  # about 30 ms: no launcher takes that long, so something else is wrong


class Stopwatch:
    """Samples of device time, in microseconds.

    The GPU is kept busy until a launch is queued; a launch that came too late for that is timed again behind a longer
    wait, which later launches keep: one stopwatch for each kind of launcher.
    """

    def __init__(self, device: str = "cuda") -> None:
        import torch

        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(int(l2_bytes * _FLUSHES), dtype=torch.int8, device=device)
        self._busy_cycles = 0

    def _timed(self, launch: Launch, turn: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        import torch

        while True:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self._flush.zero_()
            if self._busy_cycles:
                torch.cuda._sleep(self._busy_cycles)  # type: ignore[no-untyped-call]
            begin.record()
            launch(turn)
            end.record()
            was_late = begin.query()  # type: ignore[no-untyped-call]  # the GPU got there first, and has waited for the launch
            if not was_late or self._busy_cycles >= _MOST_BUSY_CYCLES:
                return begin, end
            self._busy_cycles = max(_LEAST_BUSY_CYCLES, 2 * self._busy_cycles)

    def rounds(self, launches: Sequence[Launch], turns: Sequence[int]) -> list[list[float]]:
        """Microseconds of each launch in each turn, round-robin, so that a drift of the clocks meets all alike."""
        import torch

        events = [[self._timed(launch, turn) for launch in launches] for turn in turns]
        torch.cuda.synchronize()
        return [[begin.elapsed_time(end) * 1e3 for begin, end in of_turn] for of_turn in events]
