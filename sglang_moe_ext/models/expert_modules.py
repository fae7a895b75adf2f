"""Which MoE layers a model has, and under which module names engines ask how their experts are stored."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sglang_moe_ext.core import ModelError, Quantization
from sglang_moe_ext.models.config_fields import Section, lineages, read_field, refusal

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MOST_LAYERS = 512
_LONGEST_S = 5.0
_UNNAMED_LAYERS = (100_003, 100_019)
"""Stand for all layers of a model that does not say how many it has: no entry names one of these by its number."""
_BLOCKS = {
    "feed_forward": ("llama4", "llama4_text"),
    "block_sparse_moe": ("mixtral", "minimax", "minimax_m2", "phimoe", "granitemoe", "granitemoeshared"),
    "mixer": ("nemotron_h", "nemotron_h_puzzle"),
}
"""What a layer calls its MoE block, by model type (SGLang 0.5.23, models/); elsewhere `mlp`."""
_NAMED_BLOCK = re.compile(r"layers\.\d+\.(\w+)\.experts")
_ROOTS = ("model",)
_NESTED_ROOTS = ("language_model.model", "model.language_model", "model")
"""Engines rename a checkpoint's modules to their own; an entry may use either name."""


@dataclass(frozen=True, slots=True)
class ExpertModules:
    """The MoE layers of one model; each is a tuple of the names that its module of experts may have."""

    layers: tuple[tuple[str, ...], ...]

    @property
    def count(self) -> int:
        return len(self.layers)


def locate_modules(config: Section, entries: Iterable[str] = ()) -> ExpertModules:
    """`entries`: names of the checkpoint's modules, which may tell what it calls its MoE block."""
    numbers, part, is_nested = _number_layers(config)
    block = _block(part, entries)
    roots = _NESTED_ROOTS if is_nested else _ROOTS
    if block == "mixer":
        roots = (*roots, "backbone")
    return ExpertModules(
        tuple(tuple(f"{root}.layers.{number}.{block}.experts" for root in roots) for number in numbers)
    )


def _number_layers(config: Section) -> tuple[Sequence[int], Section, bool]:
    """The numbers of the MoE layers, the part of the config that counts them, and whether that is a part of another."""
    for lineage in lineages(config):
        part = lineage[-1]
        for name in ("num_hidden_layers", "num_layers", "n_layer"):
            count = read_field(part, name)
            if isinstance(count, int) and not isinstance(count, bool) and 0 < count <= MOST_LAYERS:
                numbers = [number for number in range(count) if _has_experts(part, number)]
                return numbers or range(count), part, len(lineage) > 1
    return _UNNAMED_LAYERS, config, False


def _has_experts(part: Section, number: int) -> bool:
    """Whether that layer is an MoE layer, as far as the common fields tell."""
    first = read_field(part, "first_k_dense_replace")
    if isinstance(first, int) and number < first:
        return False
    dense = read_field(part, "mlp_only_layers")
    if isinstance(dense, (list, tuple)) and number in dense:
        return False
    kinds = next(
        (found for name in ("layers_block_type", "hybrid_override_pattern") if (found := read_field(part, name))), None
    )
    if isinstance(kinds, (list, tuple, str)) and number < len(kinds) and ({"moe", "E"} & set(map(str, kinds))):
        return kinds[number] in ("moe", "E")
    return _is_on_step(part, number)


def _is_on_step(part: Section, number: int) -> bool:
    frequency = read_field(part, "moe_layer_freq")
    if isinstance(frequency, (list, tuple)):
        return number >= len(frequency) or frequency[number] != 0
    if isinstance(frequency, int) and frequency > 1:
        return number % frequency == 0
    step = read_field(part, "decoder_sparse_step")
    if isinstance(step, int) and step > 1:
        return (number + 1) % step == 0
    step = read_field(part, "interleave_moe_layer_step")
    return not (isinstance(step, int) and step > 1) or (number + 1) % step == 0


def _block(part: Section, entries: Iterable[str]) -> str:
    for entry in entries:
        named = _NAMED_BLOCK.search(entry)
        if named is not None:
            return named[1]
    model_type = read_field(part, "model_type")
    return next((block for block, types in _BLOCKS.items() if model_type in types), "mlp")


def within_time(layers: Iterable[tuple[str, ...]], source: str) -> Iterator[tuple[str, ...]]:
    """The layers, one after the other.

    Raises: ModelError when what is asked of each of them takes longer than any real checkpoint's lists do.
    """
    end = time.monotonic() + _LONGEST_S
    for names in layers:
        if time.monotonic() > end:
            raise refusal(
                source, f"its lists of modules take over {_LONGEST_S:.0f} s to read; state the experts with --shape"
            )
        yield names


def unfused_names(experts: str) -> tuple[str, ...]:
    """The modules that SGLang asks about, of all that a layer's experts were made of."""
    return tuple(f"{experts}.0.{projection}" for projection in PROJECTIONS)


def refuse_mixed(kinds: Mapping[Quantization, int], what: str, source: str) -> ModelError:
    """The refusal of a model whose layers are stored in several ways: which, and how many layers each."""
    listed = ", ".join(f"{kind} in {count} layers" for kind, count in kinds.items())
    return refusal(
        source, f"{what} stores the experts of different layers differently ({listed}); state one of them with --shape"
    )
