"""How compressed-tensors stores experts: one quantisation for each group of target modules."""

from __future__ import annotations

from collections.abc import Mapping

from sglang_moe_ext.core import Quantisation, Scheme
from sglang_moe_ext.shapes.fields import Section, read, refusal, shown
from sglang_moe_ext.shapes.scales import WEIGHT_ONLY, group_size, in_groups, names_experts, other_kernel, weight_block

CLASS_TARGETS = ("Linear", "FusedMoE")

_W8A8: dict[str, Scheme] = {"float": "fp8_w8a8", "int": "int8_w8a8"}


def of_config_groups(section: Section, source: str) -> Quantisation:
    stated = read(section, "config_groups")
    if stated is None or stated == {}:
        return Quantisation()
    if not isinstance(stated, Mapping) or not all(isinstance(group, Mapping) for group in stated.values()):
        raise refusal(source, f"config_groups is {shown(stated)}, expected an object of objects; correct it")
    of_experts = {_of_group(group, source) for group in _for_experts(list(stated.values()))}
    if len(of_experts) > 1:
        raise refusal(source, "several config_groups may hold the experts, expected one; state them with --shape")
    return of_experts.pop()


def _for_experts(groups: list[Section]) -> list[Section]:
    """Groups that target experts by name, else those that target linear layers by class, else all."""
    named = [group for group in groups if any(names_experts(target) for target in _targets(group))]
    by_class = [group for group in groups if any(target in CLASS_TARGETS for target in _targets(group))]
    return named or by_class or groups


def _targets(group: Section) -> list[str]:
    targets = read(group, "targets")
    return [target for target in targets if isinstance(target, str)] if isinstance(targets, (list, tuple)) else []


def _of_group(group: Section, source: str) -> Quantisation:
    weights, activations = read(group, "weights"), read(group, "input_activations")
    if weights is None:
        return Quantisation()
    match read(weights, "type") or "int", read(weights, "num_bits"), activations is not None:
        case "int", int(bits), False if bits in WEIGHT_ONLY:
            return _weight_only(weights, bits, source)
        case "float" | "int" as kind, 8, True if (read(activations, "type"), read(activations, "num_bits")) == (
            kind,
            8,
        ):
            return _w8a8(weights, _W8A8[kind], source)
    stored = f"{shown(read(weights, 'type'))} weights of {shown(read(weights, 'num_bits'))} bits"
    layout = read(group, "format")
    packed = f" as {shown(layout)}" if layout is not None else ""
    raise other_kernel(f"compressed-tensors, {stored}{packed},", source)


def _weight_only(weights: Section, bits: int, source: str) -> Quantisation:
    match read(weights, "strategy"):
        case "channel":
            return in_groups(bits, None, source)
        case "group" | None:
            return in_groups(bits, group_size(weights, source), source)
        case strategy:
            raise other_kernel(f"compressed-tensors, {bits} bits with strategy {shown(strategy)},", source)


def _w8a8(weights: Section, scheme: Scheme, source: str) -> Quantisation:
    match read(weights, "strategy"):
        case "tensor" | None:
            return Quantisation(scheme)
        case "channel":
            return Quantisation(scheme, per_channel=True)
        case "block":
            return Quantisation(scheme, _block(weights, source))
        case strategy:
            raise other_kernel(f"compressed-tensors, {scheme} with strategy {shown(strategy)},", source)


def _block(weights: Section, source: str) -> tuple[int, int]:
    stated = read(weights, "block_structure")
    if isinstance(stated, str) and len(stated) < 20:
        # older releases write "128x128"
        stated = [int(side) if side.isdecimal() else side for side in stated.split("x")]
    block = weight_block(stated, "block_structure", source)
    if block is None:
        raise refusal(source, f"strategy 'block' with block_structure {shown(stated)}, expected [N, K]; correct it")
    return block
