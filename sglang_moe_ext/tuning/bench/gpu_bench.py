"""What runs in the measuring process: a layer on one GPU, and the measurement that each request describes."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_moe_ext.core import EngineError, MoEShape
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.few_tokens_config import FewTokensConfig
from sglang_moe_ext.kernel_plans import Plan
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
    LibraryLayer,
    Runner,
)
from sglang_moe_ext.tuning.bench.routing import RoutingSource

if TYPE_CHECKING:
    import torch

    from sglang_moe_ext.engines.libraries.layer_library import RunLayer
    from sglang_moe_ext.kernels.launcher import RecordedLaunch
    from sglang_moe_ext.tuning.bench.clocks import ClockReading
    from sglang_moe_ext.tuning.bench.graph_timer import GraphStopwatch
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
    engine: EngineName

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
        # In parallel with the screening, which does not need it; the first final comparison does.
        threading.Thread(target=adapter.warm_up, args=(engine, setup.shape), daemon=True).start()
        self.layer = BenchedLayer(engine, setup.shape, setup.routing, setup.seed, adapter=adapter)
        queue = cuda_queue()
        self._gemms, self._layers = Stopwatch(queue), Stopwatch(queue)
        self._graph_stopwatch: GraphStopwatch | None = None
        self._clocks = ClockWatch(0)
        self._batch: LayerBatch | None = None
        self._libraries: dict[str, RunLayer] = {}
        self._screens = 0

    def measure(self, request: BenchRequest) -> BenchResult:
        """Raises whatever the candidate makes the engine, the compiler or the GPU raise."""
        import torch

        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            return self._measure(request)
        # Out here, where no traceback holds the tensors of the first attempt.
        self._batch = None
        torch.cuda.empty_cache()
        return self._measure(request)

    def is_well(self) -> bool:
        """False where every further CUDA call fails."""
        import torch

        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def _measure(self, request: BenchRequest) -> BenchResult:
        import torch

        match request:
            case BenchGemm():
                result: BenchResult = self._time_gemm(request)
            case BenchKernelPlan():
                result = self._time_plan(request)
            case BenchLayers():
                result = self._time_layers(request)
            case CheckAccuracy():
                result = self._check(request)
        torch.cuda.synchronize()
        return result

    def _batch_of(self, tokens: int, data: int = 0) -> LayerBatch:
        seed = self._seed + data
        if self._batch is None or (self._batch.tokens, self._batch.seed) != (tokens, seed):
            self._batch = None  # two of them may not fit
            self._batch = self.layer.batch(tokens, seed)
        return self._batch

    def _time_gemm(self, request: BenchGemm) -> GemmTimes:
        self._screens += 1
        if self._screens % _KEPT_SCREENS == 0:
            self._forget_binaries()
        by_turn = self._relaunches(self._batch_of(request.tokens), request)
        launches = {group: _in_turn(by_turn, group) for group in request.groups}
        limit_us = float("inf") if request.limit_us is None else request.limit_us
        samples: dict[int, list[float]] = {}
        for group, launch in launches.items():
            [samples[group]] = self._gemms.rounds([launch], [0])
            if group == request.groups[0] and samples[group][0] > limit_us:
                break
        remaining = [group for group, us in samples.items() if us[0] <= limit_us]
        for of_turn in self._gemms.rounds([launches[group] for group in remaining], range(1, request.samples)):
            for group, us in zip(remaining, of_turn, strict=True):
                samples[group].append(us)
        return GemmTimes(tuple(tuple(samples.get(group, ())) for group in request.groups))

    def _relaunches(self, batch: LayerBatch, request: BenchGemm) -> list[RecordedLaunch]:
        """The launch of that GEMM with each routing: one through the engine's launcher, the others made from it."""
        from sglang_moe_ext.engines.meta_compile import any_group
        from sglang_moe_ext.kernels.launcher import record_launch
        from sglang_moe_ext.tuning.bench.layer import ROUTINGS

        layer = self.layer
        config = request.key.with_group(request.groups[0])
        first, *others = (self.layer.gemm(batch, request.projection, config, turn) for turn in range(ROUTINGS))
        with any_group(layer.engine.kernels), record_launch() as launches:
            layer.adapter.launch(layer.engine, layer.shape, request.projection, first, config)
        launch = launches[-1]  # those before it quantize the activations
        return [launch, *(launch.with_tensors(first.routing_of(other)) for other in others)]

    def _forget_binaries(self) -> None:
        from sglang_moe_ext.engines.meta_compile import forget_binaries

        forget_binaries(self.layer.engine.kernels)

    def _time_plan(self, request: BenchKernelPlan) -> GemmTimes:
        batch = self._batch_of(request.tokens)
        batch.drop_gemms()
        launch = self._whole(batch, request.plan)
        launch(0)
        return GemmTimes((tuple(us for [us] in self._layers.rounds([launch], range(request.samples))),))

    def _whole(self, batch: LayerBatch, runner: Runner) -> Callable[[int], torch.Tensor]:
        layer, adapter = self.layer, self.layer.adapter
        if isinstance(runner, LibraryLayer):
            run = self._library(runner.name, batch)
            return lambda turn: run(layer.whole(batch, turn))
        if isinstance(runner, Plan):
            return lambda turn: adapter.run_kernel_plan(layer.engine, layer.shape, layer.whole(batch, turn), runner)
        up, down = runner["up"], runner["down"]
        return lambda turn: adapter.run_layer(layer.engine, layer.shape, layer.whole(batch, turn), up, down)

    def _library(self, name: str, batch: LayerBatch) -> RunLayer:
        """Raises EngineError where it cannot run this layer here."""
        from sglang_moe_ext.engines.libraries.layer_library import why_not_usable
        from sglang_moe_ext.engines.libraries.registry import LIBRARIES

        if name not in self._libraries:
            if (why := why_not_usable(LIBRARIES[name], self.layer.shape)) is not None:
                raise EngineError(why)
            self._libraries[name] = LIBRARIES[name].prepare(self.layer.shape, self.layer.whole(batch, 0))
        return self._libraries[name]

    def _time_layers(self, request: BenchLayers) -> LayerTimes:
        from sglang_moe_ext.tuning.bench.layer import ROUTINGS

        batch = self._batch_of(request.tokens, request.data)
        batch.drop_gemms()
        launches = [self._whole(batch, pair) for pair in request.pairs]
        for launch in launches:
            launch(0)
        read: list[ClockReading | None] = []

        def note_clocks() -> None:
            read.append(self._clocks.read())

        if request.in_graph:
            rounds = self._graphs().rounds(launches, request.rounds, ROUTINGS, note_clocks)
        else:
            rounds = self._layers.rounds(launches, range(request.rounds), note_clocks)
        [clocks] = read
        return LayerTimes(
            us=tuple(zip(*rounds, strict=True)),
            routings=1 if request.in_graph else ROUTINGS,
            throttled=None if clocks is None else clocks.spoiled,
            sm_clock_mhz=None if clocks is None else clocks.sm_mhz,
        )

    def _graphs(self) -> GraphStopwatch:
        from sglang_moe_ext.tuning.bench.graph_timer import GraphStopwatch

        if self._graph_stopwatch is None:
            self._graph_stopwatch = GraphStopwatch()
        return self._graph_stopwatch

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
            keeps = isinstance(check.pair, FewTokensConfig)
            errors.append(self.layer.error(batch, turn, out, quantizes_activations=not keeps))
        return Accuracy(max(errors))


def _in_turn(by_turn: list[RecordedLaunch], group: int) -> Callable[[int], None]:
    from sglang_moe_ext.engines.meta_compile import GROUP

    launches = [launch.with_argument(GROUP, group) for launch in by_turn]
    return lambda turn: launches[turn % len(launches)]()
