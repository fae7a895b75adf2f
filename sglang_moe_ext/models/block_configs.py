"""Reads `block_configs`, in which each layer of a model states its own width and top-k (Nemotron Puzzle)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sglang_moe_ext.core import DifferingLayersError, MoEModel, MoEShape
from sglang_moe_ext.models.config_fields import Section, lineages, read_field, refusal, show
from sglang_moe_ext.models.field_spellings import EXPERTS, HIDDEN, TOP_K, WIDTH

_FIELD = "block_configs"
_MOST_LAYERS = 512


def has_block_configs(config: Section) -> bool:
    """True where some part of the config states the experts of its layers one by one."""
    return any(_moe_blocks(lineage[-1]) for lineage in lineages(config))


def merge_block_configs(config: Section, read: Callable[[Section], MoEModel], source: str) -> Section:
    """The config with what `block_configs` says of its MoE layers, where that is the same for all of them.

    Each layer copies its entry over the config (SGLang 0.5.23, configs/nemotron_h.py). `read` makes a model of one
    layer's config.

    Raises: DifferingLayersError when the layers differ: each kind reads a table of its own.
    """
    for lineage in lineages(config):
        root, part = lineage[0], lineage[-1]
        blocks = _moe_blocks(part)
        if not blocks or not isinstance(part, Mapping) or not isinstance(root, Mapping):
            continue
        own = {key: value for key, value in root.items() if not isinstance(value, Mapping) or "quant" in key}
        whole = {key: value for key, value in (own | dict(part)).items() if key != _FIELD}
        kinds = {_numbers(merged): merged for merged in ({**whole, **block} for block in blocks)}
        if len(kinds) > 1:
            raise _refuse_differing([read(kind) for kind in kinds.values()], source)
        return next(iter(kinds.values()))
    return config


def _moe_blocks(part: Section) -> list[Mapping[str, object]]:
    """The entries that state more than one expert."""
    stated = read_field(part, _FIELD)
    if not isinstance(stated, (list, tuple)) or len(stated) > _MOST_LAYERS:
        return []
    return [block for block in stated if isinstance(block, Mapping) and _has_experts(block)]


def _has_experts(block: Mapping[str, object]) -> bool:
    return any(block.get(name) not in (None, 0, 1) for name in EXPERTS)


def _numbers(config: Mapping[str, object]) -> tuple[str, ...]:
    """What of a layer's config makes another table."""
    return tuple(show(config.get(key)) for key in (*EXPERTS, *TOP_K, *WIDTH, *HIDDEN))


def _refuse_differing(models: Sequence[MoEModel], source: str) -> DifferingLayersError:
    shapes = dict.fromkeys(map(_shape_flag, models))
    return DifferingLayersError(
        f"{refusal(source, 'its MoE layers differ (block_configs)')}, and each kind reads a table of its own: `tune "
        f"--model` does them all, or name one, N divided by the ranks that share an expert: {'; '.join(shapes)}",
        tuple(models),
    )


def _shape_flag(model: MoEModel) -> str:
    """The layer on one rank, as --shape takes it."""
    shape = MoEShape(
        model.routed_experts,
        model.intermediate_size,
        model.hidden_size,
        model.top_k,
        model.quantization,
        gated=model.gated,
    )
    return f"--shape {shape}"
