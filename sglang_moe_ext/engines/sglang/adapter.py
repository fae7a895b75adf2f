"""SGLang, as the tuner asks it: the functions of `engines.adapter.EngineAdapter`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_moe_ext.core import Gpu, MoEShape, Projection, Quantization, Table, TableKey, TileConfig
from sglang_moe_ext.engines import few_tokens_layer, sorted_layer
from sglang_moe_ext.engines.adapter import EngineName, Sorted, Version
from sglang_moe_ext.engines.backend_answer import AskedBackend
from sglang_moe_ext.engines.lookup_probe import ProbeProcess
from sglang_moe_ext.engines.sglang import (
    installation,
    kernel_sequence,
    lookup_probe,
    runner,
    support,
    table_names,
)
from sglang_moe_ext.engines.sglang.installation import SglangInstallation
from sglang_moe_ext.engines.sglang.runner import LoadedSglang
from sglang_moe_ext.engines.tensors import GemmTensors, LayerTensors
from sglang_moe_ext.few_tokens_config import FIRST_SM, FewTokensConfig
from sglang_moe_ext.kernel_plans import Plan
from sglang_moe_ext.tables import config_table

if TYPE_CHECKING:
    import torch

NAME: EngineName = "sglang"
TITLE = "SGLang"
OFFLINE = "sglang_moe_ext.engines.sglang.compile"
HAS_DOWN_TABLES = True
SORTS_ITS_UP = True


def find() -> SglangInstallation | None:
    return installation.find()


def kernel_file(engine: SglangInstallation) -> Path:
    return engine.kernel_file


def start_probe(environment: Mapping[str, str]) -> ProbeProcess:
    return lookup_probe.AS_SERVED.start(environment)


def start_alone(environment: Mapping[str, str]) -> ProbeProcess:
    return lookup_probe.ALONE.start(environment)


def start_reader(environment: Mapping[str, str]) -> ProbeProcess:
    return lookup_probe.FROM_FILES.start(environment)


def table_key(shape: MoEShape, device_name: str, *, down: bool) -> TableKey:
    return table_names.table_key(shape, device_name, down=down)


def file_name(key: TableKey) -> str:
    return table_names.file_name(key)


def table_text(table: Table, triton: str) -> str:
    """The folder says which Triton; every key of the file must be a number."""
    return config_table.to_json(table)


def effective_config(config: TileConfig, quantization: Quantization) -> TileConfig:
    return config


def why_no_table(shape: MoEShape, gpu: Gpu, architecture: str, asked: AskedBackend | None = None) -> str | None:
    engine = find()
    version = support.NEWEST if engine is None else engine.version
    return support.why_no_table(support.AUTO, shape, gpu, architecture, version, asked)


def representative_tokens(shape: MoEShape, tokens: int) -> int:
    return runner.representative_tokens(shape, tokens)


def gemms_with_tma(quantization: Quantization, version: Version, sm: int) -> tuple[Projection, ...]:
    return support.gemms_with_tma(quantization, version, sm)


def why_not_tuned(quantization: Quantization, version: Version) -> str | None:
    return None


def has_own_kernels(version: Version, sm: int) -> bool:
    return version >= kernel_sequence.FIRST_RELEASE and sm >= FIRST_SM


def takes_sorted(shape: MoEShape) -> bool:
    return True


def takes_few_tokens(shape: MoEShape) -> bool:
    return True


def load() -> LoadedSglang:
    return runner.load()


def warm_up(loaded: LoadedSglang, shape: MoEShape) -> None:
    runner.warm_up(loaded, shape)


def seen_ids(shape: MoEShape, topk_ids: torch.Tensor) -> torch.Tensor:
    """The server maps ids to the rank before it calls the layer."""
    return topk_ids


def sort(loaded: LoadedSglang, shape: MoEShape, topk_ids: torch.Tensor, block_m: int) -> Sorted:
    return loaded.align(topk_ids, block_m, shape.experts)


def launch(
    loaded: LoadedSglang, shape: MoEShape, projection: Projection, tensors: GemmTensors, config: TileConfig
) -> None:
    runner.launch(loaded, shape, projection, tensors, config)


def run_layer(
    loaded: LoadedSglang, shape: MoEShape, tensors: LayerTensors, up: TileConfig, down: TileConfig
) -> torch.Tensor:
    return runner.run(loaded, shape, tensors, up, down)


def run_kernel_plan(loaded: LoadedSglang, shape: MoEShape, tensors: LayerTensors, path: Plan) -> torch.Tensor:
    if isinstance(path, FewTokensConfig):
        return few_tokens_layer.result(tensors, shape.quantization, path)
    return sorted_layer.result(loaded, shape, tensors, path)
