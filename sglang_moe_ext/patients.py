"""The layers that `doctor` looks at: the one that the flags name, or each one in the user's store."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sglang_moe_ext import gpus, layer_arguments
from sglang_moe_ext.core import Gpu, GpuError, ModelError, MoEShape, TableError
from sglang_moe_ext.engines import names
from sglang_moe_ext.engines.sglang import warning_line
from sglang_moe_ext.layer_arguments import Stated
from sglang_moe_ext.shapes import parse_shape
from sglang_moe_ext.store import provenance, user_store


@dataclass(frozen=True, slots=True)
class Patient:
    """A layer to look at, as that engine launches it, on a GPU that may not be here."""

    name: str
    shape: MoEShape
    gpu: Gpu
    is_here: bool
    architecture: str = ""

    @property
    def where(self) -> str:
        return "here" if self.is_here else "not here: the engine was told that it runs on it"


def named(arguments: Namespace, layer: Stated) -> Patient:
    """The layer of the flags, as SGLang has it."""
    return Patient(layer.name, layer.shape, *layer_arguments.gpu_of(arguments, layer), layer.architecture)


def named_in_vllm(arguments: Namespace, layer: Stated) -> Patient | None:
    """The layer of the flags as vLLM has it, which a --shape states already; None where it has no such layer."""
    shape = layer.vllm_shape if arguments.model or arguments.from_log else layer.shape
    return None if shape is None else Patient(layer.name, shape, *layer_arguments.gpu_of(arguments, layer))


def stored(engine: Literal["sglang", "vllm"]) -> Iterator[Patient]:
    """Each layer that the user's own store has a table for."""
    here = gpus.detect()
    seen: set[tuple[MoEShape, str]] = set()
    for path in user_store.all_tables(engine):
        known = provenance.read(path)
        run = None if known is None or not known.entries else next(iter(known.entries.values())).run
        try:
            key = names.parse(path.name)
            if run is None or key.down:
                continue
            device = warning_line.device_of(key)
            is_here = here is not None and here.device_name == device
            shape, gpu = parse_shape(run.shape), here if here is not None and is_here else gpus.find(device)
        except (ModelError, TableError, GpuError) as error:
            print(f"{path}: passed over: {error}")
            continue
        if (shape, gpu.device_name) not in seen:
            seen.add((shape, gpu.device_name))
            yield Patient(run.model, shape, gpu, is_here)
