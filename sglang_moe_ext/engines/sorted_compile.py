"""Compile the kernels of a sorted layer for a GPU that need not be here. For child processes only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_moe_ext.core import Failure, Resources, TileConfig
from sglang_moe_ext.engines import meta_compile, sorted_layer
from sglang_moe_ext.engines.few_tokens_compile import layer_tensors
from sglang_moe_ext.engines.meta_compile import meta
from sglang_moe_ext.engines.sorted_layer import HostEngine, RowValues, SortedLayer
from sglang_moe_ext.few_tokens_config import FewTokensConfig
from sglang_moe_ext.kernel_plans import (
    SCALE_GROUP,
    DownConfig,
    KernelPlan,
    SortedKernelJob,
    UpConfig,
    WarpSpecializedUp,
)

if TYPE_CHECKING:
    pass


def compile_sorted(engine: HostEngine, job: SortedKernelJob) -> Resources | Failure:
    """What the binary of this job needs, or why the compiler refuses it."""
    from sglang_moe_ext.kernels import dependent_launch, sort_tokens, tma

    tma.capability = lambda _: divmod(job.sm, 10)  # type: ignore[assignment]
    dependent_launch.is_used = lambda tensor: dependent_launch.is_available(job.sm)
    match job.config:
        case FewTokensConfig():
            raise TypeError("a plan for few tokens sorts nothing")
        case TileConfig() | UpConfig() | WarpSpecializedUp() as up:
            plan = KernelPlan(up, DownConfig(job.block_m, 128, 64, 1, 4, 3))
        case down:
            plan = KernelPlan(TileConfig(job.block_m, 128, 64, 1, 4, 3), down)
    tensors = layer_tensors(job)

    def launch_up() -> None:
        layer = sorted_layer.sort(engine, job.shape, tensors, plan)
        sorted_layer.run_activation(layer, sorted_layer.run_up(layer))

    def launch_down() -> None:
        hidden = sorted_layer.empty_hidden(job.shape, tensors, plan)
        pairs_sorted = sort_tokens.empty_sorted(tensors.topk_ids, job.shape.experts, plan.block_m)
        layer = SortedLayer(engine, job.shape, tensors, plan, pairs_sorted, hidden)
        down = sorted_layer.run_down(layer, _activations(layer))
        sorted_layer.write_sum(layer, down, layer.tensors.hidden)

    return meta_compile.compile_every_launch(job.target, launch_up if job.projection == "up" else launch_down)


def _activations(layer: SortedLayer) -> RowValues:
    """What the down GEMM reads [rows, I], with the scales of rows or of groups of columns."""
    import torch

    shape = layer.shape
    size = layer.rows, shape.intermediate_size
    if shape.quantization.scheme is None:
        return RowValues(meta(size, getattr(torch, shape.dtype)))
    groups = 1 if shape.quantization.per_channel else shape.intermediate_size // SCALE_GROUP
    return RowValues(meta(size, torch.float8_e4m3fn), meta((layer.rows, groups), torch.float32))
