"""Reads the quantization of experts off a section of NVIDIA ModelOpt, flat or nested, one algorithm or one a layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress

from sglang_moe_ext.core import CheckpointFormat, ModelError, Quantization
from sglang_moe_ext.models import expert_modules
from sglang_moe_ext.models.config_fields import Section, read_field, show
from sglang_moe_ext.models.expert_modules import ExpertModules
from sglang_moe_ext.models.weight_groups import group_size, refuse_other_kernel

_STORED = CheckpointFormat("modelopt")
_MIXED = "MIXED_PRECISION"
_BLOCK_SIDE = 128
"""Where a block-wise algorithm states no group_size (SGLang 0.5.23, modelopt_quant.py)."""


def open_section(section: Section) -> Section:
    """The part that names the algorithm: the nested one of hf_quant_config.json, or the section itself."""
    inner = read_field(section, "quantization")
    return inner if isinstance(inner, Mapping) else section


def parse_modelopt(section: Section, modules: ExpertModules, source: str) -> Quantization:
    """Raises: ModelError when layers differ, or their experts run another kernel."""
    section = open_section(section)
    if read_field(section, "quant_algo") == _MIXED:
        return _parse_mixed(read_field(section, "quantized_layers"), modules, source)
    return _parse_algorithm(section, source)


def _parse_algorithm(section: Section, source: str) -> Quantization:
    algorithm = read_field(section, "quant_algo")
    match algorithm.upper() if isinstance(algorithm, str) else algorithm:
        case "FP8" | None:
            return Quantization("fp8_w8a8", checkpoint=_STORED)
        case "FP8_PER_CHANNEL_PER_TOKEN":
            return Quantization("fp8_w8a8", per_channel=True, checkpoint=_STORED)
        case "FP8_PB_WO" | "FP8_BLOCK_SCALES":
            side = group_size(section, source) or _BLOCK_SIDE
            return Quantization("fp8_w8a8", (side, side), checkpoint=_STORED)
        case _:
            raise refuse_other_kernel(f"modelopt {show(algorithm)}", source)


def _parse_mixed(stated: object, modules: ExpertModules, source: str) -> Quantization:
    """An algorithm a layer; layers without one are not quantized."""
    layers = stated if isinstance(stated, Mapping) else {}
    main, others = _split_layers(layers, modules)
    try:
        found = Counter(_parse_algorithm(layers[key], source) for key in main)
    except ModelError as refused:
        raise _name_drafts(refused, [layers[key] for key in others], source) from refused
    if len(found) > 1:
        raise expert_modules.refuse_mixed(found, "modelopt", source)
    return next(iter(found), Quantization())


def _split_layers(layers: Mapping[str, object], modules: ExpertModules) -> tuple[list[str], list[str]]:
    """Keys of the model's own experts, one a layer, and those of other layers, as a draft's behind them.

    Where no key has the name of one of the model's layers, all keys are taken for the model's own.
    """
    experts = [key for key, layer in layers.items() if isinstance(layer, Mapping) and _is_experts(str(key))]
    first_below: dict[str, str] = {}
    for key in experts:
        first_below.setdefault(_module_of(key), key)
    own = [found for names in modules.layers if (found := _first(first_below, names)) is not None]
    if not own:
        return list(first_below.values()), []
    return own, [key for key in first_below.values() if key not in set(own)]


def _first(first_below: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((first_below[name] for name in names if name in first_below), None)


def _is_experts(key: str) -> bool:
    return "experts" in key and "shared" not in key


def _module_of(key: str) -> str:
    return key[: key.index("experts") + len("experts")]


def _name_drafts(refused: ModelError, drafts: list[object], source: str) -> ModelError:
    """The refusal of the model's experts, and which experts of other layers run the Triton kernel nevertheless."""
    runs = dict.fromkeys(str(quantization) for quantization in _readable(drafts, source))
    if not runs:
        return refused
    return ModelError(f"{refused}; the experts of its other layers, {', '.join(runs)}, do: as those of a draft model")


def _readable(drafts: list[object], source: str) -> Iterator[Quantization]:
    for draft in drafts:
        with suppress(ModelError):
            yield _parse_algorithm(draft, source)
