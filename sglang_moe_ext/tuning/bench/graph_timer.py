"""Time whole layers inside CUDA graphs, as a server decodes: the host launches a graph, and no kernel of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

from sglang_moe_ext.tuning.bench.timer import Launch, Stopwatch, cuda_queue

if TYPE_CHECKING:
    import torch

_READ_BYTES = 128 << 20
"""Read before each layer, so that the L2 holds nothing of it and has nothing to write back."""


def without_flushes(rows: Sequence[Sequence[float]], turns: int) -> list[list[float]]:
    """Microseconds of one turn, by row, of all but the first column, which has the flushes of `turns` turns alone.

    Raises:
        RuntimeError: a graph with a layer took no longer than one without.
    """
    flushes = median(row[0] for row in rows)
    times = [[(us - flushes) / turns for us in row[1:]] for row in rows]
    if min(map(min, times)) <= 0.0:
        raise RuntimeError(
            f"a CUDA graph with layers took no longer than its flushes alone ({flushes:.0f} us): another process "
            "uses this GPU, or its clocks change; see `nvidia-smi`"
        )
    return times


class GraphStopwatch:
    """Microseconds that a layer adds to a graph of flushes of the L2."""

    def __init__(self) -> None:
        import torch

        queue = cuda_queue()
        self._stopwatch = Stopwatch(replace(queue, flush=lambda: None))
        self._read = torch.ones(_READ_BYTES // 4, dtype=torch.float32, device="cuda")
        self._total = torch.empty((), dtype=torch.float32, device="cuda")

    def rounds(
        self, launches: Sequence[Launch], rounds: int, turns: int, meanwhile: Callable[[], None] | None = None
    ) -> list[list[float]]:
        """Of each launch in each round, the mean of its `turns` turns, which one graph holds, a flush before each.

        Each must have been launched before: what is loaded while a graph is captured breaks it.

        Raises:
            RuntimeError: a graph with a layer took no longer than one without.
        """
        graphs = [self._graph(launch, turns) for launch in (None, *launches)]
        replays: list[Launch] = [lambda _, graph=graph: graph.replay() for graph in graphs]  # type: ignore[misc]
        for replay in replays:
            replay(0)
        rows = self._stopwatch.rounds(replays, range(rounds), meanwhile)
        return without_flushes(rows, turns)

    def _graph(self, launch: Launch | None, turns: int) -> torch.cuda.CUDAGraph:
        import torch

        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process load kernels meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for turn in range(turns):
                torch.sum(self._read, dim=0, out=self._total)
                if launch is not None:
                    launch(turn)
        return graph
