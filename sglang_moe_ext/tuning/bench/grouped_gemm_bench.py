"""What the measuring process of a grouped GEMM runs: its operands on one GPU, and each request to a layer's bench."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_moe_ext.core import MoEShape, TileConfig
from sglang_moe_ext.tuning.bench import routing
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchGemm,
    BenchLayers,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
    GemmTimes,
    LayerTimes,
    Runner,
)
from sglang_moe_ext.tuning.bench.timer import LaunchQueue, Stopwatch, cuda_queue

if TYPE_CHECKING:
    import torch

    from sglang_moe_ext.kernels.quantize import Scales
    from sglang_moe_ext.tuning.bench.clocks import ClockReading

_SPLITS = 4
"""Splits of the rows over the experts that the samples take turns with, uniform and by Zipf's law."""


@dataclass(frozen=True, slots=True)
class GroupedGemmSetup:
    """Makes the process. `shape`: a is [rows, hidden_size], and b has the columns of its up GEMM; top_k is 1."""

    shape: MoEShape
    seed: int
    triton_cache: Path

    def __call__(self) -> GroupedGemmBench:
        """Make it, in the process that is to measure."""
        from sglang_moe_ext.tuning.bench.clocks import ClockWatch

        os.environ["TRITON_CACHE_DIR"] = str(self.triton_cache)
        return GroupedGemmBench(self.shape, self.seed, cuda_queue(), read_clocks=ClockWatch(0).read)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Operands of one number of rows; `owners` int32 [rows, 1] is the expert of each row, ascending."""

    a: torch.Tensor
    scales: Scales | None
    owners: tuple[torch.Tensor, ...]
    offsets: tuple[torch.Tensor, ...]
    out: torch.Tensor


class GroupedGemmBench:
    """The measurements of one grouped GEMM; a "layer" of a request is this GEMM with the configuration of `up`."""

    def __init__(
        self,
        shape: MoEShape,
        seed: int,
        queue: LaunchQueue,
        *,
        read_clocks: Callable[[], ClockReading | None] = lambda: None,
        device: str = "cuda",
    ) -> None:
        import torch

        from sglang_moe_ext.kernels.quantize import quantize_weights

        self.device_name: str = torch.cuda.get_device_name(0) if device == "cuda" else device
        self._shape, self._seed, self._device, self._read_clocks = replace(shape, top_k=1), seed, device, read_clocks
        self._dtype: torch.dtype = getattr(torch, shape.dtype)
        self._stopwatch = Stopwatch(queue)
        columns, k = shape.gemm("up")
        random = self._generator(seed)
        size = (shape.experts, columns, k)
        weights = torch.randn(size, generator=random, device=device, dtype=self._dtype).div_(k**0.5)
        self._weight_scale: torch.Tensor | None = None
        if shape.quantization.scheme is not None:
            weights, self._weight_scale = quantize_weights(weights, shape.quantization)
        self._weights = weights
        self._batch: tuple[tuple[int, int], _Batch] | None = None

    def measure(self, request: BenchRequest) -> BenchResult:
        """Raises whatever the configuration makes the compiler or the GPU raise."""
        match request:
            case BenchGemm(rows, _, key, groups, samples, limit_us):
                batch, us = self._batch_of(rows), list[tuple[float, ...]]()
                for group in groups:
                    us.append(self._time(batch, key.with_group(group), samples, limit_us))
                    if group == groups[0] and limit_us is not None and us[0][0] > limit_us:
                        break
                return GemmTimes((*us, *[()] * (len(groups) - len(us))))
            case BenchLayers():
                return self._compare(request)
            case CheckAccuracy(rows, pair):
                return Accuracy(self._error(self._batch_of(rows, 1), _tile(pair)))
            case _:
                raise TypeError(f"a grouped GEMM has no {request}")

    def _time(self, batch: _Batch, config: TileConfig, samples: int, limit_us: float | None) -> tuple[float, ...]:
        launch = self._launch(batch, config)
        launch(0)
        [[first]] = self._stopwatch.rounds([launch], [0])
        if limit_us is not None and first > limit_us:
            return (first,)
        return first, *(us for [us] in self._stopwatch.rounds([launch], range(1, samples)))

    def _compare(self, request: BenchLayers) -> LayerTimes:
        batch = self._batch_of(request.tokens, request.data)
        launches = [self._launch(batch, _tile(pair)) for pair in request.pairs]
        for launch in launches:
            launch(0)
        read: list[ClockReading | None] = []
        rounds = self._stopwatch.rounds(launches, range(request.rounds), lambda: read.append(self._read_clocks()))
        [clocks] = read
        return LayerTimes(
            us=tuple(zip(*rounds, strict=True)),
            routings=_SPLITS,
            throttled=None if clocks is None else clocks.spoiled,
            sm_clock_mhz=None if clocks is None else clocks.sm_mhz,
        )

    def _launch(self, batch: _Batch, config: TileConfig) -> Callable[[int], object]:
        from sglang_moe_ext.kernels.expert_gemm import grouped_gemm

        def launch(turn: int) -> object:
            offsets = batch.offsets[turn % _SPLITS]
            return grouped_gemm(batch.a, self._weights, offsets, scales=batch.scales, out=batch.out, config=config)

        return launch

    def _error(self, batch: _Batch, config: TileConfig) -> float:
        """The larger one of a uniform split and one by Zipf's law, on poisoned outputs."""
        from sglang_moe_ext.kernels import reference

        errors = []
        for turn in range(2):
            batch.out.fill_(float("nan"))
            self._launch(batch, config)(turn)
            expected = reference.grouped_gemm(batch.a, self._weights, batch.owners[turn], top_k=1, scales=batch.scales)
            errors.append(reference.relative_error(batch.out, expected))
        return max(errors)

    def _batch_of(self, rows: int, data: int = 0) -> _Batch:
        if self._batch is None or self._batch[0] != (rows, data):
            self._batch = None  # two of them may not fit
            self._batch = (rows, data), self._make_batch(rows, data)
        return self._batch[1]

    def _make_batch(self, rows: int, data: int) -> _Batch:
        import torch

        from sglang_moe_ext.kernels.quantize import as_the_gemm_reads

        seed, shape = self._seed + 1 + data, self._shape
        a = torch.randn(
            rows, shape.hidden_size, generator=self._generator(seed), device=self._device, dtype=self._dtype
        )
        scales: Scales | None = None
        if self._weight_scale is not None:
            a, scales = as_the_gemm_reads(a, self._weight_scale, shape.quantization)
        made = routing.routings(routing.MIXED, shape, rows, _SPLITS, seed, self._device)
        owners = tuple(one.topk_ids.flatten().sort().values.view(-1, 1) for one in made)
        experts = torch.arange(shape.experts + 1, device=self._device, dtype=torch.int32)
        offsets = tuple(torch.searchsorted(one.flatten(), experts).int() for one in owners)
        out = torch.empty(rows, shape.gemm("up")[0], device=self._device, dtype=self._dtype)
        return _Batch(a, scales, owners, offsets, out)

    def _generator(self, seed: int) -> torch.Generator:
        import torch

        return torch.Generator(device=self._device).manual_seed(seed)


def _tile(runner: Runner) -> TileConfig:
    if not isinstance(runner, dict):
        raise TypeError(f"a grouped GEMM does not run {runner}")
    return runner["up"]
