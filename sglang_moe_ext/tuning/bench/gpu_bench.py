"""What runs in the measuring process: a layer on one GPU, and an answer to each question about it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_moe_ext.core import MoEShape
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.sorted_kernels import KernelPlan
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchGemm,
    BenchKernelPlan,
    BenchLayers,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
    GemmTimes,
    LayerTimes,
    Runner,
)
from sglang_moe_ext.tuning.bench.routing import RoutingSource

if TYPE_CHECKING:
    import torch

    from sglang_moe_ext.kernels.launcher import RecordedLaunch
    from sglang_moe_ext.tuning.bench.clocks import ClockReading
    from sglang_moe_ext.tuning.bench.layer import LayerBatch

_KEPT_SCREENS = 2000
"""After so many screens, what Triton keeps in memory of their binaries is dropped."""


@dataclass(frozen=True, slots=True)
class BenchSetup:
    """What the process measures, and where Triton finds the binaries that are already made."""

    shape: MoEShape
    routing: RoutingSource
    seed: int
    triton_cache: Path
    engine: EngineName = "sglang"

    def __call__(self) -> GpuBench:
        """Make it, in the process that is to measure."""
        return GpuBench(self)


class GpuBench:
    """The measurements of one layer on the GPU that torch calls 0."""

    def __init__(self, setup: BenchSetup) -> None:
        os.environ["TRITON_CACHE_DIR"] = str(setup.triton_cache)
        import torch

        from sglang_moe_ext.engines.registry import ENGINES
        from sglang_moe_ext.tuning.bench.clocks import ClockWatch
        from sglang_moe_ext.tuning.bench.layer import BenchedLayer
        from sglang_moe_ext.tuning.bench.timer import Stopwatch, cuda_queue

        self.device_name: str = torch.cuda.get_device_name(0)
        self._seed = setup.seed
        adapter = ENGINES[setup.engine]
        engine = adapter.load()
        # Beside the screening, which does without: the first rematch would wait for it.
        threading.Thread(target=adapter.warm_up, args=(engine, setup.shape), daemon=True).start()
        self.layer = BenchedLayer(engine, setup.shape, setup.routing, setup.seed, adapter=adapter)
        queue = cuda_queue()
        self._gemms, self._layers = Stopwatch(queue), Stopwatch(queue)
        self._clocks = ClockWatch(0)
        self._batch: LayerBatch | None = None
        self._screens = 0

    def answer(self, question: BenchRequest) -> BenchResult:
        """Raises whatever the candidate makes the engine, the compiler or the GPU raise."""
        import torch

        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            return self._answer(question)
        # Out here, where no traceback holds the tensors of the first attempt.
        self._batch = None
        torch.cuda.empty_cache()
        return self._answer(question)

    def is_well(self) -> bool:
        """False where CUDA answers everything with an error from now on."""
        import torch

        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def _answer(self, question: BenchRequest) -> BenchResult:
        import torch

        match question:
            case BenchGemm():
                answer: BenchResult = self._screen(question)
            case BenchKernelPlan():
                answer = self._screen_path(question)
            case BenchLayers():
                answer = self._race(question)
            case CheckAccuracy():
                answer = self._check(question)
        torch.cuda.synchronize()
        return answer

    def _batch_of(self, tokens: int, data: int = 0) -> LayerBatch:
        seed = self._seed + data
        if self._batch is None or (self._batch.tokens, self._batch.seed) != (tokens, seed):
            self._batch = None  # two of them may not fit
            self._batch = self.layer.batch(tokens, seed)
        return self._batch

    def _screen(self, screen: BenchGemm) -> GemmTimes:
        self._screens += 1
        if self._screens % _KEPT_SCREENS == 0:
            self._forget_binaries()
        by_turn = self._relaunches(self._batch_of(screen.tokens), screen)
        launches = {group: _in_turn(by_turn, group) for group in screen.groups}
        limit_us = float("inf") if screen.limit_us is None else screen.limit_us
        samples: dict[int, list[float]] = {}
        for group, launch in launches.items():
            [samples[group]] = self._gemms.rounds([launch], [0])
            if group == screen.groups[0] and samples[group][0] > limit_us:
                break
        rivals = [group for group, us in samples.items() if us[0] <= limit_us]
        for of_turn in self._gemms.rounds([launches[group] for group in rivals], range(1, screen.samples)):
            for group, us in zip(rivals, of_turn, strict=True):
                samples[group].append(us)
        return GemmTimes(tuple(tuple(samples.get(group, ())) for group in screen.groups))

    def _relaunches(self, batch: LayerBatch, screen: BenchGemm) -> list[RecordedLaunch]:
        """The launch of that GEMM with each routing: one through the engine's launcher, the others made from it."""
        from sglang_moe_ext.engines.meta_compile import any_group
        from sglang_moe_ext.kernels.launcher import record_launch
        from sglang_moe_ext.tuning.bench.layer import ROUTINGS

        layer = self.layer
        config = screen.key.with_group(screen.groups[0])
        first, *others = (self.layer.gemm(batch, screen.projection, config, turn) for turn in range(ROUTINGS))
        with any_group(layer.engine.kernels), record_launch() as launches:
            layer.adapter.launch(layer.engine, layer.shape, screen.projection, first, config)
        launch = launches[-1]  # those before it quantize the activations
        return [launch, *(launch.with_tensors(first.routing_of(other)) for other in others)]

    def _forget_binaries(self) -> None:
        from sglang_moe_ext.engines.meta_compile import forget_binaries

        forget_binaries(self.layer.engine.kernels)

    def _screen_path(self, screen: BenchKernelPlan) -> GemmTimes:
        batch = self._batch_of(screen.tokens)
        batch.drop_gemms()
        launch = self._whole(batch, screen.path)
        launch(0)
        return GemmTimes((tuple(us for [us] in self._layers.rounds([launch], range(screen.samples))),))

    def _whole(self, batch: LayerBatch, runner: Runner) -> Callable[[int], torch.Tensor]:
        layer, adapter = self.layer, self.layer.adapter
        if isinstance(runner, KernelPlan):
            return lambda turn: adapter.run_kernel_plan(layer.engine, layer.shape, layer.whole(batch, turn), runner)
        up, down = runner["up"], runner["down"]
        return lambda turn: adapter.run_layer(layer.engine, layer.shape, layer.whole(batch, turn), up, down)

    def _race(self, race: BenchLayers) -> LayerTimes:
        from sglang_moe_ext.tuning.bench.layer import ROUTINGS

        batch = self._batch_of(race.tokens, race.data)
        batch.drop_gemms()
        launches = [self._whole(batch, pair) for pair in race.pairs]
        for launch in launches:
            launch(0)
        read: list[ClockReading | None] = []
        rounds = self._layers.rounds(launches, range(race.rounds), lambda: read.append(self._clocks.read()))
        [clocks] = read
        return LayerTimes(
            us=tuple(zip(*rounds, strict=True)),
            routings=ROUTINGS,
            throttled=None if clocks is None else clocks.spoiled,
            sm_clock_mhz=None if clocks is None else clocks.sm_mhz,
        )

    def _check(self, check: CheckAccuracy) -> Accuracy:
        """With one routing of each kind; the largest error of them."""
        from sglang_moe_ext.tuning.bench.layer import ROUTINGS
        from sglang_moe_ext.tuning.bench.nan_fill import NanFill

        self._batch = None
        batch = self.layer.batch(check.tokens, self._seed + 1)
        run = self._whole(batch, check.pair)
        errors = []
        for turn in range(min(len(self.layer.source.makers), ROUTINGS)):
            with NanFill():
                out = run(turn)
            errors.append(self.layer.error(batch, turn, out))
        return Accuracy(max(errors))


def _in_turn(by_turn: list[RecordedLaunch], group: int) -> Callable[[int], None]:
    from sglang_moe_ext.engines.meta_compile import GROUP

    launches = [launch.with_argument(GROUP, group) for launch in by_turn]
    return lambda turn: launches[turn % len(launches)]()
