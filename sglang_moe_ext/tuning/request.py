"""What a user asks a tuning run for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext.core import Gpu, MoEShape, Projection
from sglang_moe_ext.engines.adapter import EngineAdapter, EngineName
from sglang_moe_ext.gpu.decoder_roofline import Surroundings
from sglang_moe_ext.tuning.bench.routing import RoutingSource
from sglang_moe_ext.tuning.install_target import Install
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.search.screening import EffortName

Progress = Callable[[str, int, int], None]
"""Called with the name of the stage, how much of it is done, and how much there is; from any thread."""


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """How to measure.

    `with_tma`: the GEMMs that are timed with TMA too. `gpus`: what CUDA_VISIBLE_DEVICES is to say in each measuring
    process, one for each GPU; `ray`: the address of a cluster to measure on instead, "" for the one that Ray finds by
    itself. `resume`: go on with the newest unfinished run of this layer, or with the one in that folder.
    `with_own_kernels`: compare our own kernels with the pair chosen for the engine's. `deadline`: of the whole run, by
    time.monotonic().
    """

    effort: EffortName
    with_tma: tuple[Projection, ...]
    budget_s: float | None
    routing: RoutingSource
    gpus: tuple[str, ...]
    ray: str | None = None
    resume: bool | Path = False
    with_own_kernels: bool = False
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class TuneRequest:
    """One layer of one engine on one GPU. `gpu_is_here`: this machine has that GPU; `measuring` None: predict.

    `vllm_shape` is the layer as vLLM would launch it, None where that is unknown or impossible. `force`: predict
    although a measured table for the layer is known. `surroundings`: the rest of the model, None where unknown.
    """

    model: str
    architecture: str
    problem: Problem
    vllm_shape: MoEShape | None
    gpu_is_here: bool
    tokens: tuple[int, ...]
    measuring: MeasureOptions | None
    install: Install
    output_dir: Path | None
    seed: int
    command: str
    force: bool = False
    surroundings: Surroundings | None = None

    @property
    def shape(self) -> MoEShape:
        return self.problem.shape

    @property
    def gpu(self) -> Gpu:
        return self.problem.gpu

    @property
    def engine(self) -> EngineName:
        return self.problem.engine

    @property
    def adapter(self) -> EngineAdapter:
        return self.problem.adapter
