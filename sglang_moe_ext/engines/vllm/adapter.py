"""vLLM, as the tuner asks it: the functions of `engines.adapter.EngineAdapter`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_moe_ext.core import Gpu, MoEShape, Projection, Quantization, Table, TableKey, TileConfig
from sglang_moe_ext.engines import few_tokens_layer, sorted_layer
from sglang_moe_ext.engines.adapter import EngineName, Sorted, Version
from sglang_moe_ext.engines.backend_answer import AskedBackend
from sglang_moe_ext.engines.lookup_probe import ProbeProcess
from sglang_moe_ext.engines.tensors import GemmTensors, LayerTensors
from sglang_moe_ext.engines.vllm import installation, lookup_probe, runner, support, table_names
from sglang_moe_ext.engines.vllm.experts import NoHost
from sglang_moe_ext.engines.vllm.hook_points import GROUPS_RUN_TRITON
from sglang_moe_ext.engines.vllm.installation import VllmInstallation
from sglang_moe_ext.engines.vllm.runner import LoadedVllm
from sglang_moe_ext.few_tokens_config import FIRST_SM, FewTokensConfig
from sglang_moe_ext.kernel_plans import Plan
from sglang_moe_ext.tables import config_table

if TYPE_CHECKING:
    import torch

NAME: EngineName = "vllm"
TITLE = "vLLM"
OFFLINE = "sglang_moe_ext.engines.vllm.compile"
HAS_DOWN_TABLES = False
SORTS_ITS_UP = False


def find() -> VllmInstallation | None:
    return installation.find()


def kernel_file(engine: VllmInstallation) -> Path:
    return engine.configs_folder.with_name("fused_moe.py")


def start_probe(environment: Mapping[str, str]) -> ProbeProcess:
    return lookup_probe.AS_SERVED.start(environment)


def start_alone(environment: Mapping[str, str]) -> ProbeProcess:
    return lookup_probe.ALONE.start(environment)


def start_reader(environment: Mapping[str, str]) -> ProbeProcess:
    return lookup_probe.FROM_FILES.start(environment)


def table_key(shape: MoEShape, device_name: str, *, down: bool) -> TableKey:
    return table_names.table_key(shape, device_name)


def file_name(key: TableKey) -> str:
    return table_names.file_name(key)


def table_text(table: Table, triton: str) -> str:
    """With the Triton, which the engine takes out unread, and SPLIT_K, which its kernel for groups must be given."""
    return config_table.to_json(table, triton_version=triton, with_split_k=True)


def effective_config(config: TileConfig, quantization: Quantization) -> TileConfig:
    """The launcher holds BLOCK_SIZE_K down to the block of the scales; the table says what runs."""
    block = quantization.block_shape
    return replace(config, block_k=min(config.block_k, *block)) if block and quantization.is_block_wise else config


def why_no_table(shape: MoEShape, gpu: Gpu, architecture: str, asked: AskedBackend | None = None) -> str | None:
    engine = find()
    version = support.NEWEST if engine is None else engine.version
    return support.why_no_table(shape, gpu, architecture, version, asked)


def representative_tokens(shape: MoEShape, tokens: int) -> int:
    return runner.representative_tokens(shape, tokens)


def gemms_with_tma(quantization: Quantization, version: Version, sm: int) -> tuple[Projection, ...]:
    """None: a variable of the environment decides on tensor descriptors, and no table does."""
    return ()


def why_not_tuned(quantization: Quantization, version: Version) -> str | None:
    in_groups = quantization.block_shape is not None and not quantization.is_block_wise
    if not in_groups or version >= GROUPS_RUN_TRITON:
        return None
    return "up to 0.32 it may hand the tiles of a table for weights of groups to a CUDA kernel, for few tokens"


def has_own_kernels(version: Version, sm: int) -> bool:
    return sm >= FIRST_SM


def takes_sorted(shape: MoEShape) -> bool:
    return takes_few_tokens(shape) and sorted_layer.can_sort(shape)


def takes_few_tokens(shape: MoEShape) -> bool:
    """Its experts get quantized activations, and ids of all ranks."""
    return shape.quantization.scheme is None and shape.ep == 1


def load() -> LoadedVllm:
    return runner.load()


def warm_up(loaded: LoadedVllm, shape: MoEShape) -> None:
    """Nothing: what the layer runs beside its GEMMs is compiled in the engine's libraries."""


def seen_ids(shape: MoEShape, topk_ids: torch.Tensor) -> torch.Tensor:
    return runner.global_ids(shape, topk_ids)


def sort(loaded: LoadedVllm, shape: MoEShape, topk_ids: torch.Tensor, block_m: int) -> Sorted:
    return runner.sort(loaded, shape, topk_ids, block_m)


def launch(
    loaded: LoadedVllm, shape: MoEShape, projection: Projection, tensors: GemmTensors, config: TileConfig
) -> None:
    runner.launch(loaded, shape, projection, tensors, config)


def run_layer(
    loaded: LoadedVllm, shape: MoEShape, tensors: LayerTensors, up: TileConfig, down: TileConfig
) -> torch.Tensor:
    return runner.run(loaded, shape, tensors, up, down)


def run_kernel_plan(loaded: LoadedVllm, shape: MoEShape, tensors: LayerTensors, path: Plan) -> torch.Tensor:
    if isinstance(path, FewTokensConfig):
        return few_tokens_layer.result(tensors, shape.quantization, path)
    return sorted_layer.result(NoHost(), shape, tensors, path)
