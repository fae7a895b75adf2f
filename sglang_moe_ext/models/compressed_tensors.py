"""Reads the quantization of experts off a section of compressed-tensors, as llm-compressor writes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from sglang_moe_ext.core import CheckpointFormat, Quantization, Scheme
from sglang_moe_ext.models import expert_modules
from sglang_moe_ext.models.config_fields import Section, read_field, refusal, show
from sglang_moe_ext.models.expert_modules import ExpertModules, Targets
from sglang_moe_ext.models.weight_groups import (
    WEIGHT_ONLY,
    group_quantization,
    group_size,
    refuse_other_kernel,
    weight_block,
)

METHOD = "compressed_tensors"
_CLASS_TARGETS = ("Linear", "FusedMoE")
_W8A8: dict[str, Scheme] = {"float": "fp8_w8a8", "int": "int8_w8a8"}


def parse_config_groups(section: Section, modules: ExpertModules, source: str) -> Quantization:
    """What the groups of the section make of the model's experts; no group: only sparsity, or nothing.

    Raises: ModelError when layers differ, or their experts run another kernel.
    """
    stated = read_field(section, "config_groups")
    if stated is None or stated == {}:
        return Quantization()
    if not isinstance(stated, Mapping) or not all(isinstance(group, Mapping) for group in stated.values()):
        raise refusal(source, f"config_groups is {show(stated)}, expected an object of objects; correct it")
    groups = list(stated.values())
    taken = Counter(_number_of_group(groups, modules, source))
    found: Counter[Quantization] = Counter()
    for number, layers in taken.items():
        found[_parse_group(groups[number], source)] += layers
    if len(found) > 1:
        raise expert_modules.refuse_mixed(found, "several config_groups, of which each", source)
    return next(iter(found))


def _number_of_group(groups: Sequence[Section], modules: ExpertModules, source: str) -> list[int]:
    """For each MoE layer the group that targets it: by name, else by the class of its linear layers, else the first."""
    targets = [expert_modules.parse_targets(_targets(group)) for group in groups]
    by_class = [at for at, one in enumerate(targets) if not one.names.isdisjoint(_CLASS_TARGETS)]
    if len(by_class) > 1 or (not by_class and len(groups) > 1 and not any(map(_is_by_name, targets))):
        raise refusal(source, "several config_groups may hold the experts, expected one; state them with --shape")
    default = by_class[0] if by_class else 0
    return [
        next((at for at, one in enumerate(targets) if _match_layer(one, names)), default)
        for names in expert_modules.within_time(modules.layers, source)
    ]


def _is_by_name(targets: Targets) -> bool:
    return bool(targets.patterns or targets.unread or targets.names - set(_CLASS_TARGETS))


def _match_layer(targets: Targets, names: tuple[str, ...]) -> bool:
    """Whether a target matches the first expert, which engines ask about, in any of the module's names."""
    return any(targets.match_name(name) for experts in names for name in expert_modules.unfused_names(experts))


def _targets(group: Section) -> list[str]:
    targets = read_field(group, "targets")
    return [target for target in targets if isinstance(target, str)] if isinstance(targets, (list, tuple)) else []


def _parse_group(group: Section, source: str) -> Quantization:
    weights, activations = read_field(group, "weights"), read_field(group, "input_activations")
    if weights is None:
        return Quantization()
    match read_field(weights, "type") or "int", read_field(weights, "num_bits"), activations is not None:
        case "int", int(bits), False if bits in WEIGHT_ONLY:
            return _group_weight_only(weights, bits, source)
        case "float" | "int" as kind, 8, True if (
            read_field(activations, "type"),
            read_field(activations, "num_bits"),
        ) == (kind, 8):
            return _w8a8(weights, _W8A8[kind], source)
    stored = f"{show(read_field(weights, 'type'))} weights of {show(read_field(weights, 'num_bits'))} bits"
    layout = read_field(group, "format")
    packed = f" as {show(layout)}" if layout is not None else ""
    raise refuse_other_kernel(f"compressed-tensors, {stored}{packed},", source)


def _group_weight_only(weights: Section, bits: int, source: str) -> Quantization:
    match read_field(weights, "strategy"):
        case "channel":
            group = None
        case "group" | None:
            group = group_size(weights, source)
        case strategy:
            raise refuse_other_kernel(f"compressed-tensors, {bits} bits with strategy {show(strategy)},", source)
    stated = CheckpointFormat(
        METHOD,
        bits,
        group,
        symmetric=read_field(weights, "symmetric") is not False,
        activation_order=bool(read_field(weights, "actorder")),
    )
    return group_quantization(bits, group, stated, source)


def _w8a8(weights: Section, scheme: Scheme, source: str) -> Quantization:
    stored = CheckpointFormat(METHOD)
    match read_field(weights, "strategy"):
        case "tensor" | None:
            return Quantization(scheme, checkpoint=stored)
        case "channel":
            return Quantization(scheme, per_channel=True, checkpoint=stored)
        case "block":
            return Quantization(scheme, _block(weights, source), checkpoint=stored)
        case strategy:
            raise refuse_other_kernel(f"compressed-tensors, {scheme} with strategy {show(strategy)},", source)


def _block(weights: Section, source: str) -> tuple[int, int]:
    stated = read_field(weights, "block_structure")
    if isinstance(stated, str) and len(stated) < 20:
        # older releases write "128x128"
        stated = [int(side) if side.isdecimal() else side for side in stated.split("x")]
    block = weight_block(stated, "block_structure", source)
    if block is None:
        raise refusal(source, f"strategy 'block' with block_structure {show(stated)}, expected [N, K]; correct it")
    return block
