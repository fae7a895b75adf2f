"""Time launches on the GPU: cold L2 before each one, and no launch overhead inside the events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Launch = Callable[[int], None]
"""Queues one launch; its argument is the number of the round, by which inputs take turns."""

_FLUSH_BYTES = 256 * 1024 * 1024
"""More than four times the L2 of an H200 (60 MB)."""
_BUSY_CYCLES = 600_000
"""About 0.3 ms on an H200: longer than the engine's launcher takes (0.1 ms), so the kernel waits in the queue."""


class Stopwatch:
    """Samples of device time, in microseconds."""

    def __init__(self, device: str = "cuda") -> None:
        import torch

        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def _timed(self, launch: Launch, turn: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flush.zero_()
        torch.cuda._sleep(_BUSY_CYCLES)  # type: ignore[no-untyped-call]
        begin.record()
        launch(turn)
        end.record()
        return begin, end

    def rounds(self, launches: Sequence[Launch], rounds: int) -> list[list[float]]:
        """Microseconds of each launch in each round, in turn, so that a drift of the clocks meets all alike."""
        import torch

        events = [[self._timed(launch, turn) for launch in launches] for turn in range(rounds)]
        torch.cuda.synchronize()
        return [[begin.elapsed_time(end) * 1e3 for begin, end in of_round] for of_round in events]
