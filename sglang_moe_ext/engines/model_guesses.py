"""Guess which model, launched how, asks for a table: a file's name holds neither the hidden size nor top-k."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from sglang_moe_ext.core import ModelError, MoEModel, MoEShape, Parallelism, Quantization, TableKey
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.engines.sglang import sharding as sglang_sharding
from sglang_moe_ext.engines.sglang import table_names as sglang_table_names
from sglang_moe_ext.engines.vllm import sharding as vllm_sharding
from sglang_moe_ext.engines.vllm import table_names as vllm_table_names

_SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model, and the quantizations that its checkpoints are published in, the usual one first."""

    model: MoEModel
    quantizations: tuple[Quantization, ...]


@dataclass(frozen=True, slots=True)
class LaunchLimits:
    """What is known of the launch; None where it is not. `engine_version` is that of the guessed engine."""

    tp: int | None = None
    ep: int | None = None
    least_tp: int = 1
    least_ep: int = 1
    redundant_experts: int = 0
    engine_version: tuple[int, int, int] = sglang_sharding.NEWEST

    def allow(self, parallelism: Parallelism) -> bool:
        return (
            self.tp in (None, parallelism.tp)
            and self.ep in (None, parallelism.ep)
            and parallelism.tp >= self.least_tp
            and parallelism.ep >= self.least_ep
        )


@dataclass(frozen=True, slots=True)
class LaunchGuess:
    """A model, quantized and split in one way, that asks for the table.

    `is_usual`: in the quantization that its checkpoint mostly has. `is_published`: in one that some checkpoint has.
    """

    model: MoEModel
    parallelism: Parallelism
    shape: MoEShape
    engine: EngineName
    is_usual: bool
    is_published: bool
    fuses_shared_experts: bool = True

    @property
    def is_plain(self) -> bool:
        """A published checkpoint, split by tensor parallelism alone, with the engine's own choice of fusion."""
        return self.is_published and self.fuses_shared_experts and self.parallelism.ep == 1

    @property
    def layer(self) -> MoEShape:
        """What a table depends on: equal for guesses between which nothing needs to be asked."""
        return replace(self.shape, ep=1, fused_shared=0)

    @property
    def order(self) -> tuple[bool, bool, int, bool, int]:
        """Smallest first: published weights, default fusion, the plainest split, the usual weights, few ranks."""
        tp, ep = self.parallelism.tp, self.parallelism.ep
        split = 0 if ep == 1 else 1 if ep == tp else 2
        return not self.is_published, not self.fuses_shared_experts, split, not self.is_usual, tp


def guess_launches(
    key: TableKey, models: Iterable[KnownModel], limits: LaunchLimits, engine: EngineName
) -> list[LaunchGuess]:
    """The launches of the known models that ask for this table, the likeliest first, one for each model and layer."""
    best: dict[tuple[str, MoEShape], LaunchGuess] = {}
    for known in models:
        for guess in _guesses(key, known, limits, engine):
            name = known.model.name, guess.layer
            if name not in best or guess.order < best[name].order:
                best[name] = guess
    return sorted(best.values(), key=lambda guess: (guess.order, guess.model.name))


def _guesses(key: TableKey, known: KnownModel, limits: LaunchLimits, engine: EngineName) -> Iterator[LaunchGuess]:
    for quantization, is_published in _quantizations(key, known):
        model = replace(known.model, quantization=quantization)
        is_usual = quantization == known.quantizations[0]
        for parallelism in _splits(limits, engine):
            for fuses in _fusions(model, engine):
                shape = launch(model, parallelism, limits, engine, fuse_shared_experts=fuses)
                if shape is not None and _table_key(shape, key, engine) == key:
                    yield LaunchGuess(model, parallelism, shape, engine, is_usual, is_published, fuses)


def _fusions(model: MoEModel, engine: EngineName) -> tuple[bool, ...]:
    return (True, False) if engine == "sglang" and model.shared_experts else (True,)


def _quantizations(key: TableKey, known: KnownModel) -> Iterator[tuple[Quantization, bool]]:
    """(Quantization, whether it is published): else the name's own scheme, as when the server quantizes the weights."""
    published = [quantization for quantization in known.quantizations if _fits(key, quantization)]
    for quantization in published:
        yield quantization, True
    if not published and key.scheme != "int4_w4a16":
        yield Quantization(key.scheme, key.block_shape, key.per_channel), False


def _fits(key: TableKey, quantization: Quantization) -> bool:
    """A first selection; the whole name is compared afterwards, as the engine's own naming makes it."""
    return quantization.scheme == key.scheme or (key.scheme is None and quantization.scheme == "int8_w8a8")


def _splits(limits: LaunchLimits, engine: EngineName) -> Iterator[Parallelism]:
    """Sizes that people launch, and those that were stated. vLLM splits experts over all ranks, or not at all."""
    sizes = sorted({*_SIZES, *(size for size in (limits.tp, limits.ep) if size is not None and size > 0)})
    for tp in sizes:
        for ep in sizes:
            if tp % ep == 0 and (engine == "sglang" or ep in (1, tp)) and limits.allow(Parallelism(tp, ep)):
                yield Parallelism(tp, ep)


def launch(
    model: MoEModel,
    parallelism: Parallelism,
    limits: LaunchLimits,
    engine: EngineName,
    *,
    fuse_shared_experts: bool = True,
) -> MoEShape | None:
    """The layer that one rank launches, or None where the model cannot be split so."""
    with_redundant = replace(model, routed_experts=model.routed_experts + limits.redundant_experts)
    try:
        if engine == "vllm":
            return vllm_sharding.launched_shape(with_redundant, parallelism, engine_version=limits.engine_version)
        return sglang_sharding.launched_shape(
            with_redundant,
            parallelism,
            engine_version=limits.engine_version,
            fuse_shared_experts=fuse_shared_experts,
        )
    except ModelError:
        return None


def _table_key(shape: MoEShape, key: TableKey, engine: EngineName) -> TableKey:
    if engine == "vllm":
        return vllm_table_names.table_key(shape, key.device_name)
    return sglang_table_names.table_key(shape, key.device_name, down=key.down)


def file_name(key: TableKey, engine: EngineName) -> str:
    """The name of that table as the engine writes it."""
    return vllm_table_names.file_name(key) if engine == "vllm" else sglang_table_names.file_name(key)
