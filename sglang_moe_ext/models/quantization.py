"""Reads how a checkpoint stores the weights of its experts off the quantization section of its config."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from sglang_moe_ext.core import CheckpointFormat, ModelError, MoEModel, OlderReading, Quantization, Scheme
from sglang_moe_ext.models import compressed_tensors, expert_modules, modelopt
from sglang_moe_ext.models.auto_round import parse_auto_round
from sglang_moe_ext.models.config_fields import CONFIG_CLASS_ERRORS, Section, lineages, read_field, refusal, show
from sglang_moe_ext.models.expert_modules import Covers, ExpertModules
from sglang_moe_ext.models.weight_groups import group_quantization, group_size, refuse_other_kernel, weight_block

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
    for part in _parts(config):
        expert_dtype = read_field(part, "expert_dtype")
        if isinstance(expert_dtype, str) and "fp4" in expert_dtype.lower():
            raise refuse_other_kernel(f"expert_dtype {show(expert_dtype)}", source)
    found = _locate_section(config, source)
    return Quantization() if found is None else _parse_section(config, *found, source)


def read_quantization(model: MoEModel, config: Section, *, source: str) -> MoEModel:
    """The model with what its config says of its weights, and with what older engines make of the same.

    Raises: ModelError as `quantization_from_config`.
    """
    quantization = quantization_from_config(config, source=source)
    older = tuple(_older_readings(config, quantization, source))
    return replace(model, quantization=quantization, older_readings=older)


def _parts(config: Section) -> Iterator[Section]:
    yield config
    yield from {id(lineage[-1]): lineage[-1] for lineage in lineages(config)}.values()


def _locate_section(config: Section, source: str) -> tuple[Mapping[str, object], str] | None:
    """The first section that is not empty, and its method."""
    for part in _parts(config):
        for name in SECTIONS:
            stated = read_field(part, name)
            if stated is None or stated == {}:
                continue
            section = _open_section(stated)
            if section is None:
                raise refusal(
                    source, f"{name} is {show(stated)}, expected an object; correct it, or state the layer with --shape"
                )
            return section, _method(section, name, source)
    return None


def _parse_section(config: Section, section: Mapping[str, object], method: str, source: str) -> Quantization:
    entries = _exclusions(section, method, source)
    modules = expert_modules.locate_modules(config, entries)
    if entries and expert_modules.excludes_experts(modules, _covers(method, entries, source), source):
        return Quantization()
    if method in OTHER_KERNELS:
        raise refuse_other_kernel(method, source)
    if method not in METHODS:
        raise refusal(source, f"unknown quant_method {show(method)}; state the experts with --shape and its dtype")
    return METHODS[method](section, modules, source)


def _open_section(stated: object) -> Mapping[str, object] | None:
    """The section as a mapping, also when a library has already made an object of it."""
    to_dict = None if isinstance(stated, Mapping) else read_field(stated, "to_dict")
    try:
        opened = to_dict() if callable(to_dict) else stated
    except CONFIG_CLASS_ERRORS:
        return None
    return opened if isinstance(opened, Mapping) else None


def _method(section: Mapping[str, object], name: str, source: str) -> str:
    stated = read_field(section, "quant_method")
    if isinstance(stated, str):
        return stated.lower().replace("-", "_")
    marks = {"config_groups": "compressed_tensors", "quant_algo": "modelopt", "quantization": "modelopt"}
    method = next((method for mark, method in marks.items() if mark in section), None)
    if stated is not None or method is None:
        raise refusal(source, f"{name} names no quant_method; add it, or state the experts with --shape")
    return method


def _exclusions(section: Mapping[str, object], method: str, source: str) -> list[str]:
    entries = expert_modules.list_entries(section, source)
    if method.startswith("modelopt"):
        entries += expert_modules.list_entries(modelopt.open_section(section), source)
    return entries


def _covers(method: str, entries: Iterable[str], source: str) -> Covers:
    """How engines read the list of that method."""
    if method == compressed_tensors.METHOD:
        return expert_modules.cover_by_target(entries, source)
    if method.startswith("modelopt"):
        return expert_modules.cover_by_glob(entries)
    if method in _SUBSTRING_METHODS:
        return expert_modules.cover_by_substring(entries)
    return expert_modules.cover_by_path(entries)


_SUBSTRING_METHODS = ("awq", "awq_marlin", "moe_wna16", "gptq", "gptq_marlin", "auto_round")
FIRST_SGLANG_WITH_IGNORED_EXPERTS = (0, 5, 10)
"""Before, the list of compressed-tensors is not asked about experts (compressed_tensors_moe.py of 0.5.8)."""
FIRST_SGLANG_WITH_QUANTIZED_CHILDREN = (0, 5, 18)
"""From there on an entry covers a module by its name or suffix (compressed_tensors/utils.py)."""


def _older_readings(config: Section, quantization: Quantization, source: str) -> Iterator[OlderReading]:
    """Of compressed-tensors' list of ignored modules, which SGLang has read in three ways."""
    found = _locate_section(config, source)
    if found is None or found[1] != compressed_tensors.METHOD:
        return
    entries = _exclusions(*found, source)
    if not entries:
        return
    modules = expert_modules.locate_modules(config, entries)
    covers = expert_modules.cover_by_substring_of_child(entries)
    try:
        whole = METHODS[found[1]](found[0], modules, source)
        older = Quantization() if expert_modules.excludes_experts(modules, covers, source) else whole
    except ModelError:  # an older release would refuse, or mix, what newer ones read: not an answer about these
        return
    if {whole, older} != {quantization}:
        yield OlderReading(FIRST_SGLANG_WITH_IGNORED_EXPERTS, whole)
    if older != quantization:
        yield OlderReading(FIRST_SGLANG_WITH_QUANTIZED_CHILDREN, older)


def _fp8(section: Section, _: ExpertModules, source: str) -> Quantization:
    block = weight_block(read_field(section, "weight_block_size"), "weight_block_size", source)
    return Quantization("fp8_w8a8", block, checkpoint=CheckpointFormat("fp8"))


def _blockwise_int8(section: Section, _: ExpertModules, source: str) -> Quantization:
    block = weight_block(read_field(section, "weight_block_size"), "weight_block_size", source)
    return Quantization("int8_w8a8", block, checkpoint=CheckpointFormat("blockwise_int8"))


def _per_channel(method: str, scheme: Scheme) -> Callable[[Section, ExpertModules, str], Quantization]:
    return lambda *_: Quantization(scheme, per_channel=True, checkpoint=CheckpointFormat(method))


def _weight_only(method: str) -> Callable[[Section, ExpertModules, str], Quantization]:
    def parse(section: Section, modules: ExpertModules, source: str) -> Quantization:
        merged = _with_dynamic(section, modules, source)
        if merged is None:
            return Quantization()
        stated = (merged.get(name) for name in ("bits", "w_bit", "wbits"))
        bits = next((value for value in stated if value is not None), None)
        group = group_size(merged, source)
        stored = CheckpointFormat(
            method,
            bits if isinstance(bits, int) else 0,
            group,
            symmetric=merged.get("zero_point") is not True and merged.get("sym") is not False,
            activation_order=merged.get("desc_act") is True,
        )
        return group_quantization(bits, group, stored, source)

    return parse


def _with_dynamic(section: Section, modules: ExpertModules, source: str) -> dict[str, object] | None:
    """The section with GPTQModel's `dynamic` rule for the experts in front of it; None where the rule leaves them out.

    Keys are patterns, behind `+:` or nothing for what overrides, behind `-:` for what is left out.
    """
    merged = dict(section) if isinstance(section, Mapping) else {}
    rules = merged.get("dynamic")
    if not isinstance(rules, Mapping):
        return merged
    for key, override in rules.items():
        pattern = expert_modules.compile_pattern(str(key).removeprefix("-:").removeprefix("+:"))
        if pattern is None:
            continue
        covered = sum(any(map(pattern.match, names)) for names in expert_modules.within_time(modules.layers, source))
        if covered == modules.count:
            return (
                None
                if str(key).startswith("-:")
                else {**merged, **dict(override if isinstance(override, Mapping) else {})}
            )
        if 2 * covered > modules.count:
            raise refusal(
                source,
                f"dynamic stores the experts of {covered} of {modules.count} MoE layers differently; "
                "state one of them with --shape",
            )
    return merged


METHODS: dict[str, Callable[[Section, ExpertModules, str], Quantization]] = {
    "fp8": _fp8,
    "w8a8_fp8": _per_channel("w8a8_fp8", "fp8_w8a8"),
    "fbgemm_fp8": _per_channel("fbgemm_fp8", "fp8_w8a8"),
    "w8a8_int8": _per_channel("w8a8_int8", "int8_w8a8"),
    "blockwise_int8": _blockwise_int8,
    "compressed_tensors": compressed_tensors.parse_config_groups,
    "awq": _weight_only("awq"),
    "awq_marlin": _weight_only("awq"),
    "gptq": _weight_only("gptq"),
    "gptq_marlin": _weight_only("gptq"),
    "auto_round": parse_auto_round,
    "moe_wna16": _weight_only("moe_wna16"),
    "modelopt": modelopt.parse_modelopt,
    "modelopt_fp8": modelopt.parse_modelopt,
    "modelopt_mixed": modelopt.parse_modelopt,
}
