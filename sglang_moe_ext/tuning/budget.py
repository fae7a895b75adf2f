"""How long a run may search: each batch size gets its share of what is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_KEPT_FOR_THE_REMATCH = 0.25
"""Of the budget: no choice is made without a rematch, so screening has to end before the budget does. A rematch is not
cut short: a budget too small for one of each batch size is overrun by what they take."""


class Budget:
    """`seconds` from now on, None for no limit. `stations` work at the same time."""

    def __init__(
        self, seconds: float | None, shares: int, stations: int = 1, clock: Callable[[], float] = time.monotonic
    ):
        self._clock, self._stations, self._shares = clock, stations, shares
        self._end = None if seconds is None else clock() + seconds * (1 - _KEPT_FOR_THE_REMATCH)
        self._taking = threading.Lock()

    def is_spent(self) -> bool:
        """True once nothing is left for screening, and what is kept for the rematch runs."""
        return self._end is not None and self._clock() >= self._end

    def share(self) -> Callable[[], bool]:
        """Begin one of the shares: what comes back says whether it is used up."""
        with self._taking:
            now, end, shares = self._clock(), self._end, max(self._shares, 1)
            self._shares -= 1
        if end is None:
            return lambda: False
        until = now + max(end - now, 0.0) * min(1.0, self._stations / shares)
        return lambda: self._clock() >= until
