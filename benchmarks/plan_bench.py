"""The measuring process of `benchmarks.kernel_plans`: layers in turn, and the time of each stage of a kernel plan."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

from sglang_moe_ext.core import MoEShape
from sglang_moe_ext.engines import sorted_layer
from sglang_moe_ext.kernel_plans import KernelPlan
from sglang_moe_ext.tuning.bench import routing
from sglang_moe_ext.tuning.bench.gpu_bench import BenchSetup, GpuBench
from sglang_moe_ext.tuning.bench.messages import BenchRequest, BenchResult
from sglang_moe_ext.tuning.bench.timer import Stopwatch, cuda_queue

SEED, _STAGE_TURNS = 2000, 12


@dataclass(frozen=True, slots=True)
class TimeStages:
    """Time each stage of a plan alone, on what the stages before it left. The result is StageTimes."""

    tokens: int
    plan: KernelPlan


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Median microseconds by stage."""

    us: dict[str, float]


@dataclass(frozen=True, slots=True)
class OfLayer:
    """A request about one layer. A hang costs TIME_LIMIT_S."""

    TIME_LIMIT_S: ClassVar[float] = 60.0

    shape: MoEShape
    request: BenchRequest | TimeStages


@dataclass(frozen=True, slots=True)
class LayersSetup:
    """Makes the process, which imports the engine once for all layers."""

    triton_cache: Path

    def __call__(self) -> LayersBench:
        return LayersBench(self)


class LayersBench:
    """The measurements of the layer that is asked about; the weights of the one before are dropped."""

    def __init__(self, setup: LayersSetup) -> None:
        os.environ["TRITON_CACHE_DIR"] = str(setup.triton_cache)
        import torch

        from sglang_moe_ext.engines.registry import SGLANG

        self._setup = setup
        self._shape: MoEShape | None = None
        self._bench: GpuBench | None = None
        self.device_name: str = torch.cuda.get_device_name(0)
        SGLANG.load()

    def measure(self, asked: OfLayer) -> BenchResult | StageTimes:
        bench = self._bench_of(asked.shape)
        match asked.request:
            case TimeStages(tokens, plan):
                return StageTimes(_time_stages(bench, tokens, plan))
            case request:
                return bench.measure(request)

    def is_well(self) -> bool:
        return self._bench is None or self._bench.is_well()

    def _bench_of(self, shape: MoEShape) -> GpuBench:
        import torch

        if self._bench is None or shape != self._shape:
            self._bench = None
            torch.cuda.empty_cache()
            setup = BenchSetup(shape, routing.SOURCES["mixed"], SEED, self._setup.triton_cache, "sglang")
            self._bench, self._shape = setup(), shape
        return self._bench


def _time_stages(bench: GpuBench, tokens: int, plan: KernelPlan) -> dict[str, float]:
    layer_of = bench.layer
    batch = layer_of.batch(tokens, SEED)
    stages = _stages(layer_of.engine, layer_of.shape, layer_of.whole(batch, 0), plan)
    alone = [lambda _, launch=launch: launch() for launch in stages.values()]
    rows = Stopwatch(cuda_queue()).rounds(alone, range(_STAGE_TURNS))
    return {name: median(row[at] for row in rows) for at, name in enumerate(stages)}


def _stages(engine: Any, shape: MoEShape, tensors: Any, plan: KernelPlan) -> dict[str, Callable[[], object]]:
    """By name, what launches each stage that the plan has."""
    import torch

    def sort() -> sorted_layer.SortedLayer:
        return sorted_layer.sort(engine, shape, tensors, plan)

    layer = sort()
    gate_up = sorted_layer.run_up(layer)
    inner = sorted_layer.run_activation(layer, gate_up)
    down_rows, out = sorted_layer.run_down(layer, inner), torch.empty_like(tensors.hidden)
    return {
        "sort" if layer.hidden.scale is None else "sort and quantize": sort,
        "up": lambda: sorted_layer.run_up(layer),
        **({} if inner is gate_up else {"activation": lambda: sorted_layer.run_activation(layer, gate_up)}),
        "down": lambda: sorted_layer.run_down(layer, inner),
        "sum": lambda: sorted_layer.write_sum(layer, down_rows, out),
    }
