"""Which layers `doctor` examines: the one that the flags name, or each one that the user's store has a table for."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from sglang_moe_ext.cli import engine_choice, gpu_args
from sglang_moe_ext.cli.layer_args import LayerArgs
from sglang_moe_ext.core import Gpu, GpuError, ModelError, MoEShape, TableError
from sglang_moe_ext.engines import missing_config_log, table_names
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.models import parse_shape
from sglang_moe_ext.tables import provenance, user_store


@dataclass(frozen=True, slots=True)
class LayerUnderTest:
    """A layer as one engine launches it, on a GPU that this machine may not have."""

    name: str
    shape: MoEShape
    gpu: Gpu
    is_here: bool
    architecture: str = ""

    @property
    def pretended_gpu(self) -> Gpu | None:
        """The GPU that the engine has to be told it runs on."""
        return None if self.is_here else self.gpu


def from_flags(arguments: argparse.Namespace, layer: LayerArgs, engine: EngineName) -> LayerUnderTest | None:
    """The layer of the flags as that engine launches it; None where it cannot split the model so.

    A pasted line of vLLM says nothing about SGLang.
    """
    if engine == "sglang" and layer.line_engine == "vllm":
        return None
    shape: MoEShape | None = layer.shape
    if engine == "vllm" and (arguments.model or arguments.from_log):  # a --shape states what the rank launches
        shape = layer.vllm_shape
    if shape is None:
        return None
    gpu, is_here = gpu_args.gpu_of(arguments, layer)
    if engine == engine_choice.choose(None):  # once, where both engines are examined
        gpu_args.print_memory_note(layer, gpu)
    return LayerUnderTest(layer.name, shape, gpu, is_here, layer.architecture)


def from_store(engine: EngineName) -> Iterator[LayerUnderTest]:
    """Each layer that the user's own store has a table for; prints a line for a table that names none."""
    here = specs.detect()
    seen: set[tuple[MoEShape, str]] = set()
    for path in user_store.all_tables(engine):
        known = provenance.read(path)
        run = None if known is None or not known.entries else next(iter(known.entries.values())).run
        try:
            key = table_names.parse(path.name)
            if run is None or key.down:
                continue
            device = missing_config_log.device_of(key)
            is_here = here is not None and here.device_name == device
            shape, gpu = parse_shape(run.shape), here if here is not None and is_here else find_gpu(device)
        except (ModelError, TableError, GpuError) as error:
            print(f"skipped {path}: {error}")
            continue
        if (shape, gpu.device_name) not in seen:
            seen.add((shape, gpu.device_name))
            yield LayerUnderTest(run.model, shape, gpu, is_here)
