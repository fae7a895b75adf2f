"""Understand SGLang's own complaint about a missing table, as a user pastes it from a log."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from sglang_moe_ext.core import ModelError, MoEModel, MoEShape, Parallelism, Quantization, TableError, TableKey
from sglang_moe_ext.engines import table_names
from sglang_moe_ext.engines.sglang import table_names as sglang_table_names
from sglang_moe_ext.engines.sglang.sharding import NEWEST, launched_shape

_FILE = re.compile(r"(E=\d+,N=\d+,device_name=[^\"'\n]*?\.json)")
_SIZES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class LaunchGuess:
    """A model, and the way it must be split, that asks for the table of the line."""

    model: MoEModel
    parallelism: Parallelism
    shape: MoEShape


def missing_table(line: str) -> TableKey:
    """The key of the table that the line says is missing.

    Raises:
        TableError: the line names no table.
    """
    match = _FILE.search(line)
    if match is None:
        raise TableError(
            "--from-log: the line names no table; expected SGLang's own, with .../E=...,N=...,device_name=...json"
        )
    return table_names.parse(match[1])


def device_of(key: TableKey) -> str:
    """The GPU's name, as far as a file name tells it."""
    return key.device_name.replace("_", " ")


def _asks_for(shape: MoEShape, key: TableKey) -> bool:
    asked = sglang_table_names.table_key(shape, key.device_name, down=key.down)
    return asked == key


def guess_launches(
    key: TableKey, models: Iterable[MoEModel], engine_version: tuple[int, int, int] = NEWEST
) -> list[LaunchGuess]:
    """The known models that ask for this table, each with the smallest split that does."""
    found: list[LaunchGuess] = []
    for model in models:
        quantized = _with_scheme_of(key, model)
        for tp in _SIZES:
            for ep in (size for size in _SIZES if tp % size == 0):
                parallelism = Parallelism(tp, ep)
                try:
                    shape = launched_shape(quantized, parallelism, engine_version=engine_version)
                except ModelError:
                    continue
                if _asks_for(shape, key) and not any(guess.model.name == model.name for guess in found):
                    found.append(LaunchGuess(quantized, parallelism, shape))
    return found


def _with_scheme_of(key: TableKey, model: MoEModel) -> MoEModel:
    """The model, quantized as the file name says: the name is what the server asked for."""
    if key.scheme is None:
        return replace(model, quantization=Quantization())
    return replace(model, quantization=Quantization(key.scheme, key.block_shape, key.per_channel))
