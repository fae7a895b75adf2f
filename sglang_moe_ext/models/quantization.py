"""Reads how a checkpoint stores the weights of its experts off the quantization section of its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sglang_moe_ext.core import ModelError, Quantization, Scheme
from sglang_moe_ext.models.config_fields import (
    CONFIG_CLASS_ERRORS,
    Section,
    lineages,
    read_field,
    refusal,
    show,
    whole_number,
)

EXCLUSIONS = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules")
NO_BLOCK = (None, 0, -1)
WEIGHT_ONLY: dict[int, Scheme] = {4: "int4_w4a16", 8: "int8_w8a16"}


def other_kernel(method: str, source: str) -> ModelError:
    return refusal(
        source,
        f"experts quantized with {method} do not run the Triton kernel that JSON tables configure; "
        "give a bf16, fp8 or int8 checkpoint of the model, or state the experts with --shape",
    )


def weight_block(stated: object, name: str, source: str) -> tuple[int, int] | None:
    """(N, K) of a scale; None where none is stated, which ModelOpt also writes as [0, None]."""
    if stated is None:
        return None
    if not isinstance(stated, (list, tuple)) or len(stated) != 2:
        raise refusal(source, f"{name} is {show(stated)}, expected [N, K], such as [128, 128]; correct it")
    n, k = stated
    if n in NO_BLOCK and k in NO_BLOCK:
        return None
    return whole_number(n, f"{name} N", source), whole_number(k, f"{name} K", source)


def group_size(section: Section, source: str) -> int | None:
    """Weights along K that share a scale; None (also written -1) where a whole channel does."""
    for name in ("group_size", "q_group_size"):
        stated = read_field(section, name)
        if stated is not None:
            return None if stated == -1 else whole_number(stated, name, source)
    return None


def group_quantization(bits: object, group: int | None, source: str) -> Quantization:
    """Weights of 4 or 8 bits that the kernel unpacks; activations stay in 16."""
    scheme = WEIGHT_ONLY.get(bits) if isinstance(bits, int) else None
    if scheme is None:
        raise refusal(source, f"weights of {show(bits)} bits, expected 4 or 8; state the experts with --shape")
    return Quantization(scheme, per_channel=True) if group is None else Quantization(scheme, (0, group))


def excludes_experts(section: Section) -> bool:
    """True where an exclusion covers the experts of every layer: it names experts, and not shared ones or a layer."""
    for name in EXCLUSIONS:
        excluded = read_field(section, name)
        for entry in excluded if isinstance(excluded, (list, tuple)) else ():
            if isinstance(entry, str) and not _is_narrower(entry):
                return True
    return False


def names_experts(pattern: str) -> bool:
    """True where a pattern speaks of routed experts; one with a negative lookahead speaks of all the rest.

    Patterns are not run: one written by a stranger may never end.
    """
    return "experts" in pattern and "shared" not in pattern and "(?!" not in pattern


def _is_narrower(entry: str) -> bool:
    return not names_experts(entry) or any(letter.isdigit() for letter in entry.replace("[0-9]", ""))


CLASS_TARGETS = ("Linear", "FusedMoE")

_W8A8: dict[str, Scheme] = {"float": "fp8_w8a8", "int": "int8_w8a8"}


def parse_config_groups(section: Section, source: str) -> Quantization:
    stated = read_field(section, "config_groups")
    if stated is None or stated == {}:
        return Quantization()
    if not isinstance(stated, Mapping) or not all(isinstance(group, Mapping) for group in stated.values()):
        raise refusal(source, f"config_groups is {show(stated)}, expected an object of objects; correct it")
    of_experts = {_parse_group(group, source) for group in _for_experts(list(stated.values()))}
    if len(of_experts) > 1:
        raise refusal(source, "several config_groups may hold the experts, expected one; state them with --shape")
    return of_experts.pop()


def _for_experts(groups: list[Section]) -> list[Section]:
    """Groups that target experts by name, else those that target linear layers by class, else all."""
    named = [group for group in groups if any(names_experts(target) for target in _targets(group))]
    by_class = [group for group in groups if any(target in CLASS_TARGETS for target in _targets(group))]
    return named or by_class or groups


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
        ) == (
            kind,
            8,
        ):
            return _w8a8(weights, _W8A8[kind], source)
    stored = f"{show(read_field(weights, 'type'))} weights of {show(read_field(weights, 'num_bits'))} bits"
    layout = read_field(group, "format")
    packed = f" as {show(layout)}" if layout is not None else ""
    raise other_kernel(f"compressed-tensors, {stored}{packed},", source)


def _group_weight_only(weights: Section, bits: int, source: str) -> Quantization:
    match read_field(weights, "strategy"):
        case "channel":
            return group_quantization(bits, None, source)
        case "group" | None:
            return group_quantization(bits, group_size(weights, source), source)
        case strategy:
            raise other_kernel(f"compressed-tensors, {bits} bits with strategy {show(strategy)},", source)


def _w8a8(weights: Section, scheme: Scheme, source: str) -> Quantization:
    match read_field(weights, "strategy"):
        case "tensor" | None:
            return Quantization(scheme)
        case "channel":
            return Quantization(scheme, per_channel=True)
        case "block":
            return Quantization(scheme, _block(weights, source))
        case strategy:
            raise other_kernel(f"compressed-tensors, {scheme} with strategy {show(strategy)},", source)


def _block(weights: Section, source: str) -> tuple[int, int]:
    stated = read_field(weights, "block_structure")
    if isinstance(stated, str) and len(stated) < 20:
        # older releases write "128x128"
        stated = [int(side) if side.isdecimal() else side for side in stated.split("x")]
    block = weight_block(stated, "block_structure", source)
    if block is None:
        raise refusal(source, f"strategy 'block' with block_structure {show(stated)}, expected [N, K]; correct it")
    return block


MIXED = "MIXED_PRECISION"
BLOCK_SIDE = 128
"""Where a block-wise algorithm states no group_size (SGLang 0.5.23, modelopt_quant.py)."""


def parse_modelopt(section: Section, source: str) -> Quantization:
    inner = read_field(section, "quantization")
    section = inner if isinstance(inner, Mapping) else section
    if excludes_experts(section):
        return Quantization()
    if read_field(section, "quant_algo") == MIXED:
        return _parse_mixed(read_field(section, "quantized_layers"), source)
    return _parse_algorithm(section, source)


def _parse_algorithm(section: Section, source: str) -> Quantization:
    match read_field(section, "quant_algo"):
        case "FP8" | None:
            return Quantization("fp8_w8a8")
        case "FP8_PER_CHANNEL_PER_TOKEN":
            return Quantization("fp8_w8a8", per_channel=True)
        case "FP8_PB_WO" | "FP8_BLOCK_SCALES":
            side = group_size(section, source) or BLOCK_SIDE
            return Quantization("fp8_w8a8", (side, side))
        case algorithm:
            raise other_kernel(f"modelopt {show(algorithm)}", source)


def _parse_mixed(layers: object, source: str) -> Quantization:
    """An algorithm a layer; those without one are not quantized."""
    of_experts = {
        _parse_algorithm(layer, source)
        for name, layer in (layers.items() if isinstance(layers, Mapping) else ())
        if isinstance(layer, Mapping) and names_experts(str(name))
    }
    if len(of_experts) > 1:
        raise refusal(source, "modelopt stores the experts of different layers differently; state them with --shape")
    return of_experts.pop() if of_experts else Quantization()


SECTIONS = ("quantization_config", "compression_config")

OTHER_KERNELS = (
    "mxfp4",
    "mxfp8",
    "nvfp4",
    "gpt_oss_mxfp4",
    "modelopt_fp4",
    "nvfp4_online",
    "petit_nvfp4",
    "minimax_m3_nvfp4",
    "mxfp_w4a8",
    "w4afp8",
    "bitsandbytes",
    "gguf",
    "humming",
    "fp_quant",
)
"""Methods whose experts never reach the Triton kernel that reads JSON tables (SGLang 0.5.23, layers/quantization)."""


def quantization_from_config(config: Section, *, source: str = "config.json") -> Quantization:
    """Raises: ModelError when the method is unknown, malformed, or its experts run another kernel."""
    parts = {id(lineage[-1]): lineage[-1] for lineage in lineages(config)}
    for part in (config, *parts.values()):
        expert_dtype = read_field(part, "expert_dtype")
        if isinstance(expert_dtype, str) and "fp4" in expert_dtype.lower():
            raise other_kernel(f"expert_dtype {show(expert_dtype)}", source)
    for part in (config, *parts.values()):
        for name in SECTIONS:
            stated = read_field(part, name)
            if stated is not None and stated != {}:
                return _parse_section(stated, name, source)
    return Quantization()


def _parse_section(stated: object, name: str, source: str) -> Quantization:
    section = _opened(stated)
    if section is None:
        raise refusal(
            source, f"{name} is {show(stated)}, expected an object; correct it, or state the layer with --shape"
        )
    if excludes_experts(section):
        return Quantization()
    method = _method(section)
    if method is None:
        raise refusal(source, f"{name} names no quant_method; add it, or state the experts with --shape")
    if method in OTHER_KERNELS:
        raise other_kernel(method, source)
    if method not in METHODS:
        raise refusal(source, f"unknown quant_method {show(method)}; state the experts with --shape and its dtype")
    return METHODS[method](section, source)


def _opened(stated: object) -> Mapping[str, object] | None:
    """The section as a mapping, also when a library has already made an object of it."""
    to_dict = None if isinstance(stated, Mapping) else read_field(stated, "to_dict")
    try:
        opened = to_dict() if callable(to_dict) else stated
    except CONFIG_CLASS_ERRORS:
        return None
    return opened if isinstance(opened, Mapping) else None


def _method(section: Mapping[str, object]) -> str | None:
    stated = read_field(section, "quant_method")
    if stated is not None:
        return stated.lower().replace("-", "_") if isinstance(stated, str) else None
    marks = {"config_groups": "compressed_tensors", "quant_algo": "modelopt", "quantization": "modelopt"}
    return next((method for mark, method in marks.items() if mark in section), None)


def _fp8(section: Section, source: str) -> Quantization:
    return Quantization("fp8_w8a8", weight_block(read_field(section, "weight_block_size"), "weight_block_size", source))


def _blockwise_int8(section: Section, source: str) -> Quantization:
    return Quantization(
        "int8_w8a8", weight_block(read_field(section, "weight_block_size"), "weight_block_size", source)
    )


def _per_channel(scheme: Scheme) -> Callable[[Section, str], Quantization]:
    return lambda _section, _source: Quantization(scheme, per_channel=True)


def _weight_only(section: Section, source: str) -> Quantization:
    bits = next(
        (read_field(section, name) for name in ("bits", "w_bit", "wbits") if read_field(section, name) is not None),
        None,
    )
    return group_quantization(bits, group_size(section, source), source)


METHODS: dict[str, Callable[[Section, str], Quantization]] = {
    "fp8": _fp8,
    "w8a8_fp8": _per_channel("fp8_w8a8"),
    "fbgemm_fp8": _per_channel("fp8_w8a8"),
    "w8a8_int8": _per_channel("int8_w8a8"),
    "blockwise_int8": _blockwise_int8,
    "compressed_tensors": parse_config_groups,
    "awq": _weight_only,
    "awq_marlin": _weight_only,
    "gptq": _weight_only,
    "gptq_marlin": _weight_only,
    "auto_round": _weight_only,
    "moe_wna16": _weight_only,
    "modelopt": parse_modelopt,
    "modelopt_fp8": parse_modelopt,
    "modelopt_mixed": parse_modelopt,
}
