"""Reads the experts of a model off its config: a config.json as parsed, or an object of a config class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sglang_moe_ext import untrusted
from sglang_moe_ext.core import CheckpointDtype, ModelError, MoEModel
from sglang_moe_ext.models.block_configs import has_block_configs, merge_block_configs
from sglang_moe_ext.models.config_fields import Section, lineages, read_field, refusal, show, whole_number
from sglang_moe_ext.models.field_spellings import (
    COMMON,
    EXPERTS,
    FAMILIES,
    NOT_GATED,
    PARTS,
    SHARED_WIDTH,
    TOP_K,
    Family,
    Names,
)
from sglang_moe_ext.models.quantization import read_quantization


@dataclass(frozen=True, slots=True)
class Experts:
    """The part, the config that it is a part of, and the names that hold in it."""

    root: Section
    section: Section
    family: Family

    def first(self, names: Names, places: tuple[Section, ...] | None = None) -> tuple[str, object] | None:
        """The first of the names that is stated, with its value."""
        for place in self._places() if places is None else places:
            for name in names:
                value = read_field(place, name)
                if value is not None:
                    return name, value
        return None

    def _places(self) -> Iterator[Section]:
        yield self.section
        for name in PARTS:
            yield read_field(self.section, name)

    def has_moe_layers(self) -> bool:
        layers = self.first(self.family.layer_lists)
        if layers is None or not isinstance(layers[1], (list, tuple, str)):
            return True
        return any(kind in layers[1] for kind in self.family.moe_layers)


def locate_experts(config: Section) -> Experts | None:
    """None for a dense model."""
    for lineage in lineages(config):
        root, section = lineage[0], lineage[-1]
        experts = Experts(root, section, _family(section, root))
        found = experts.first(EXPERTS)
        if found is not None and found[1] not in (0, 1) and experts.has_moe_layers():
            return experts
    return None


def _family(section: Section, root: Section) -> Family:
    for key in (*_identities(section), *_identities(root)):
        if key in FAMILIES:
            return FAMILIES[key]
    return COMMON


def _identities(section: Section) -> Iterator[str]:
    """Model type, then architectures."""
    model_type = read_field(section, "model_type")
    if isinstance(model_type, str):
        yield model_type
    architectures = read_field(section, "architectures")
    if isinstance(architectures, (list, tuple)):
        yield from (name for name in architectures if isinstance(name, str))


_MOST_LAYERS = 512
DTYPES: dict[str, CheckpointDtype] = {
    "float16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
    "float32": "float32",
    "float": "float32",
}
_ZERO_EXPERTS: Names = ("zero_expert_num",)
"""Choices of the router without weights, behind the routed experts (LongCat-Flash)."""


def from_config(config: Section, *, name: str, source: str) -> MoEModel:
    """Raises: ModelError when the model is dense, a number is missing or impossible, or another kernel runs it."""
    config = merge_block_configs(config, lambda one: from_config(one, name=name, source=source), source)
    experts = locate_experts(config)
    if experts is None:
        raise _dense(source)
    if not experts.family.runs_fused_moe:
        raise refusal(source, f"not run by a fused-MoE kernel: {experts.family.why}; give another model, or --shape")
    routed = _number(experts, EXPERTS, "number of experts", source)
    if routed == 1:
        raise _dense(source)
    top_k = _number(experts, TOP_K, "number of experts per token", source)
    if top_k > routed:
        raise refusal(source, f"{top_k} experts per token of {routed}, expected no more than there are; correct it")
    hidden_places = (experts.section, experts.root)
    hidden_size = _number(experts, experts.family.hidden, "hidden size", source, places=hidden_places)
    model = MoEModel(
        name=untrusted.show(name),
        architecture=_architecture(experts),
        routed_experts=routed,
        top_k=top_k,
        hidden_size=hidden_size,
        intermediate_size=_width(experts, source),
        shared_experts=_shared(experts, source),
        gated=_gated(experts),
        dtype=_dtype(experts),
        source=source,
        zero_experts=_zero_experts(experts, source),
    )
    return read_quantization(model, config, source=source)


def _zero_experts(experts: Experts, source: str) -> int:
    found = experts.first(_ZERO_EXPERTS)
    return 0 if found is None else whole_number(found[1], found[0], source, at_least=0)


def _dense(source: str) -> ModelError:
    names = ", ".join(EXPERTS)
    return refusal(source, f"a dense model: none of {names} is above 1; give a mixture-of-experts model, or --shape")


def leaves_to_its_class(config: Section) -> bool:
    """True where a number may be missing because the config class has it as a default.

    A nested section of a saved config lists only what departs from those defaults.
    """
    if has_block_configs(config):
        return False
    experts = locate_experts(config)
    if experts is None:
        return True
    needed = (EXPERTS, TOP_K, (*experts.family.width, *experts.family.merged_width), experts.family.hidden)
    if any(experts.first(names) is None for names in needed):
        return True
    nested = experts.section is not experts.root
    return nested and bool(experts.family.shared) and experts.first(experts.family.shared) is None


def _number(
    experts: Experts, names: Names, meaning: str, source: str, places: tuple[Section, ...] | None = None
) -> int:
    found = experts.first(names, places)
    if found is None:
        raise refusal(
            source,
            f"no {meaning}: expected one of {', '.join(names)}; complete the config, or state the experts with --shape",
        )
    name, value = found
    _refuse_differing_layers(experts, name, source)
    if isinstance(value, (list, tuple)):
        value = _one_of_list(value, name, experts.family, source)
    return whole_number(value, name, source)


def _one_of_list(values: list[object] | tuple[object, ...], name: str, family: Family, source: str) -> object:
    if not values or not (
        family.text_comes_first or all(type(value) is int and value == values[0] for value in values)
    ):
        kinds = ", ".join(dict.fromkeys(map(show, values[:_MOST_LAYERS])))
        raise refusal(
            source,
            f"{name} is {kinds} in different layers, expected the same in each: every kind reads a table of its own; "
            "state one with --shape",
        )
    return values[0]


def _refuse_differing_layers(experts: Experts, name: str, source: str) -> None:
    layers = read_field(experts.section, "per_layer_config")
    if isinstance(layers, Mapping) and any(read_field(layer, name) is not None for layer in layers.values()):
        raise refusal(
            source, f"per_layer_config changes {name} from layer to layer, expected one value; state it with --shape"
        )


def _width(experts: Experts, source: str) -> int:
    merged = experts.first(experts.family.merged_width)
    if merged is not None and experts.first(experts.family.width) is None:
        return whole_number(merged[1], merged[0], source, at_least=2) // 2
    return _number(experts, (*experts.family.width, *experts.family.dense_width), "width of an expert", source)


def _shared(experts: Experts, source: str) -> int:
    found = experts.first(experts.family.shared)
    if found is None:
        return _shared_by_width(experts, source)
    name, value = found
    if isinstance(value, (list, tuple)):
        value = _one_of_list(value, name, experts.family, source)
    return whole_number(value, name, source, at_least=0)


def _shared_by_width(experts: Experts, source: str) -> int:
    """Where a config states the shared expert's width alone: how many routed experts wide it is, if a whole number."""
    found = experts.first(SHARED_WIDTH) if experts.family.shared else None
    if found is None:
        return 0
    shared, width = whole_number(found[1], found[0], source, at_least=0), _width(experts, source)
    return shared // width if shared % width == 0 else 0


def _gated(experts: Experts) -> bool:
    activation = read_field(experts.section, "mlp_hidden_act") or read_field(experts.section, "hidden_act")
    return experts.family.gated and activation not in NOT_GATED


def _dtype(experts: Experts) -> CheckpointDtype:
    """bfloat16 where none is stated, and where SGLang and vLLM serve a Gemma that is stored in float32."""
    stored = _stored_dtype(experts)
    is_gemma = any(one.startswith("gemma") for one in _identities(experts.section))
    return "bfloat16" if stored == "float32" and is_gemma else stored


def _stored_dtype(experts: Experts) -> CheckpointDtype:
    for section in (experts.section, experts.root):
        for name in ("dtype", "torch_dtype"):
            value = read_field(section, name)
            stated = "" if isinstance(value, (Mapping, list)) else str(value).removeprefix("torch.")
            if stated in DTYPES:
                return DTYPES[stated]
    return "bfloat16"


def _architecture(experts: Experts) -> str:
    """The root's, because that is the class that an engine picks."""
    for section in (experts.root, experts.section):
        architectures = read_field(section, "architectures")
        if isinstance(architectures, (list, tuple)) and architectures and isinstance(architectures[0], str):
            return architectures[0]
    model_type = read_field(experts.root, "model_type")
    return model_type if isinstance(model_type, str) else ""
