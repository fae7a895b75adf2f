"""A table that the user gives as a file: which engine, Triton, GPU and layer it is for, as far as the file tells."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext.core import (
    Gpu,
    ModelError,
    MoEShape,
    Parallelism,
    Table,
    TableError,
    TableKey,
)
from sglang_moe_ext.engines import table_names
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.engines.model_guesses import KnownModel, LaunchLimits, guess_launches
from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.engines.sglang import installation as sglang
from sglang_moe_ext.engines.sglang import sharding as sglang_sharding
from sglang_moe_ext.engines.sglang import table_names as sglang_table_names
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.models import parse_shape
from sglang_moe_ext.models.builtin import builtin_records
from sglang_moe_ext.tables import config_table, files, provenance
from sglang_moe_ext.tables.provenance import Provenance


@dataclass(frozen=True, slots=True)
class GivenTable:
    """What a file tells. `engine` and `triton` are None where it does not tell them."""

    path: Path
    key: TableKey
    table: Table
    known: Provenance | None
    engine: EngineName | None
    triton: str | None

    @property
    def gpu(self) -> Gpu:
        """Raises GpuError where nothing is known of the GPU in the file's name."""
        return find_gpu(self.key.device_name)


@dataclass(frozen=True, slots=True)
class FittingLayer:
    """A layer that asks for a table of that name: the models that have it, each with its split."""

    shape: MoEShape
    models: tuple[str, ...]


def read(path: Path) -> GivenTable:
    """Read the table, strictly.

    Raises:
        TableError: its name is no engine's, or it cannot be read.
    """
    key = table_names.parse(path.name)
    table = config_table.read(path)
    document = json.loads(files.read_bounded(path))
    stated = document.get("triton_version")
    folder = path.absolute().parent.name
    in_folder = folder.removeprefix("triton_").replace("_", ".") if folder.startswith("triton_") else None
    known = provenance.read(path)
    return GivenTable(
        path=path,
        key=key,
        table=table,
        known=known,
        engine=_engine(path, key, has_triton=stated is not None, is_in_folder=in_folder is not None, known=known),
        triton=stated if isinstance(stated, str) else in_folder or _triton_of(known),
    )


def _engine(
    path: Path, key: TableKey, *, has_triton: bool, is_in_folder: bool, known: Provenance | None
) -> EngineName | None:
    """SGLang keeps a folder for each Triton and has tables for the down projection; vLLM writes the Triton into it."""
    if key.down or key.per_channel or key.scheme == "int8_w8a8":
        return "sglang"
    if has_triton:
        return "vllm"
    if is_in_folder and path.absolute().parent.parent.name != "vllm":
        return "sglang"
    if key.block_shape is not None:
        return "sglang" if path.name == sglang_table_names.file_name(key) else "vllm"
    return None


def _triton_of(known: Provenance | None) -> str | None:
    runs = [] if known is None else [entry.run for entry in known.entries.values()]
    return next((run.triton for run in runs if run.triton), None)


def stated_shape(given: GivenTable) -> MoEShape | None:
    """The layer that its provenance states, None where it has none."""
    runs = [] if given.known is None else [entry.run for entry in given.known.entries.values()]
    try:
        return parse_shape(runs[0].shape) if runs else None
    except ModelError:
        return None


def fitting_layers(key: TableKey, engine: EngineName) -> list[FittingLayer]:
    """The layers of built-in models that ask for a table of that name: a name tells no hidden size and no top-k."""
    known = [KnownModel(record.model, record.quantizations) for record in builtin_records()]
    installed = sglang.find()
    version = sglang_sharding.NEWEST if installed is None else installed.version
    found: dict[MoEShape, list[str]] = {}
    for guess in guess_launches(key, known, LaunchLimits(engine_version=version), engine):
        found.setdefault(guess.layer, []).append(f"{guess.model.name} {_split(guess.parallelism)}")
    return [FittingLayer(shape, tuple(models)) for shape, models in found.items()]


def _split(parallelism: Parallelism) -> str:
    return f"--tp-size {parallelism.tp}" + (f" --ep-size {parallelism.ep}" if parallelism.ep > 1 else "")


def layer_of(given: GivenTable, engine: EngineName, stated: MoEShape | None) -> FittingLayer:
    """The layer that the table is for: what the user states, what its provenance states, or the only one that fits.

    Raises:
        TableError: none fits, several do, or the stated one asks for a table of another name.
    """
    shape = stated or stated_shape(given)
    if shape is not None:
        asked = ENGINES[engine].table_key(shape, given.key.device_name, down=given.key.down)
        if asked != given.key:
            raise TableError(f"{given.path} is not for {shape}, which asks for {ENGINES[engine].file_name(asked)}")
        return FittingLayer(shape, ())
    fitting = fitting_layers(given.key, engine)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = "; ".join(f"{it.models[0]} (K={it.shape.hidden_size}, top-k {it.shape.top_k})" for it in fitting)
        raise TableError(f"{given.path} fits several layers, {names}: name yours with --model or --shape")
    raise TableError(
        f"{given.path}: no built-in model asks for a table of that name: name the layer with --model, or with "
        f"--shape E={given.key.experts},N={given.key.intermediate_size},K=...,topk=..."
    )
