"""A bench for the measuring process whose candidates say what happens to them: num_stages does.

It stands for a GPU, which is not here: what hangs, dies or ends CUDA there does so here.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from sglang_moe_ext.core import CompileKey, MoEShape, TileConfig
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchGemm,
    BenchLayers,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
    GemmTimes,
    LayerTimes,
)
from sglang_moe_ext.tuning.bench.routing import RoutingSource

HANGS, EXITS, SEGFAULTS, STICKY, RAISES, EXITS_IN_A_LAYER, WRONG = range(6, 13)
"""Values of num_stages; no real candidate has so many, and with any other nothing happens."""


def us_of(tokens: int, config: TileConfig | CompileKey, group_m: int = 1) -> float:
    """Microseconds of one GEMM: larger tiles are faster, and so are those with something wrong with them."""
    return 100.0 + tokens / 10 - config.block_n / 8 - 5 * config.num_stages + group_m / 10 + config.num_warps / 10


@dataclass(frozen=True, slots=True)
class MakeKeyedBench:
    """Made as `bench.Setup` is; a line for each start goes into `triton_cache`."""

    shape: MoEShape
    routing: RoutingSource
    seed: int
    triton_cache: Path
    engine: str = "sglang"

    def __call__(self) -> KeyedBench:
        with (self.triton_cache / "starts").open("a") as file:
            file.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
        return KeyedBench()


class KeyedBench:
    device_name = "NVIDIA H200"

    def measure(self, request: BenchRequest) -> BenchResult:
        match request:
            case BenchGemm(tokens, _, key, groups, samples):
                _suffer(key.num_stages)
                return GemmTimes(tuple((us_of(tokens, key, group),) * samples for group in groups))
            case BenchLayers(tokens, pairs, rounds):
                if any(config.num_stages == EXITS_IN_A_LAYER for pair in pairs for config in pair.values()):
                    os._exit(1)
                times = (sum(us_of(tokens, config, config.group_m) for config in pair.values()) for pair in pairs)
                return LayerTimes(tuple((us,) * rounds for us in times), routings=1)
            case CheckAccuracy(pair=pair):
                return Accuracy(1.0 if any(config.num_stages == WRONG for config in pair.values()) else 1e-3)


def _suffer(num_stages: int) -> None:
    if num_stages == HANGS:
        time.sleep(600)
    elif num_stages == EXITS:
        os._exit(7)
    elif num_stages == SEGFAULTS:
        os.kill(os.getpid(), signal.SIGSEGV)
    elif num_stages == STICKY:
        raise torch.AcceleratorError("an illegal memory access was encountered")
    elif num_stages == RAISES:
        raise ValueError("refused")
