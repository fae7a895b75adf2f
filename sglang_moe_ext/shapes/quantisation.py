"""Reads how a checkpoint stores the weights of its experts off the quantization section of its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sglang_moe_ext.core import Quantisation, Scheme
from sglang_moe_ext.shapes.config_groups import of_config_groups
from sglang_moe_ext.shapes.fields import CONFIG_CLASS_ERRORS, Section, lineages, read, refusal, shown
from sglang_moe_ext.shapes.modelopt import of_modelopt
from sglang_moe_ext.shapes.scales import experts_left_out, group_size, in_groups, other_kernel, weight_block

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


def quantisation_from_config(config: Section, *, source: str = "config.json") -> Quantisation:
    """Raises: ModelError when the method is unknown, malformed, or its experts run another kernel."""
    parts = {id(lineage[-1]): lineage[-1] for lineage in lineages(config)}
    for part in (config, *parts.values()):
        expert_dtype = read(part, "expert_dtype")
        if isinstance(expert_dtype, str) and "fp4" in expert_dtype.lower():
            raise other_kernel(f"expert_dtype {shown(expert_dtype)}", source)
    for part in (config, *parts.values()):
        for name in SECTIONS:
            stated = read(part, name)
            if stated is not None and stated != {}:
                return _of_section(stated, name, source)
    return Quantisation()


def _of_section(stated: object, name: str, source: str) -> Quantisation:
    section = _opened(stated)
    if section is None:
        raise refusal(
            source, f"{name} is {shown(stated)}, expected an object; correct it, or state the layer with --shape"
        )
    if experts_left_out(section):
        return Quantisation()
    method = _method(section)
    if method is None:
        raise refusal(source, f"{name} names no quant_method; add it, or state the experts with --shape")
    if method in OTHER_KERNELS:
        raise other_kernel(method, source)
    if method not in METHODS:
        raise refusal(source, f"unknown quant_method {shown(method)}; state the experts with --shape and its dtype")
    return METHODS[method](section, source)


def _opened(stated: object) -> Mapping[str, object] | None:
    """The section as a mapping, also when a library has already made an object of it."""
    to_dict = None if isinstance(stated, Mapping) else read(stated, "to_dict")
    try:
        opened = to_dict() if callable(to_dict) else stated
    except CONFIG_CLASS_ERRORS:
        return None
    return opened if isinstance(opened, Mapping) else None


def _method(section: Mapping[str, object]) -> str | None:
    stated = read(section, "quant_method")
    if stated is not None:
        return stated.lower().replace("-", "_") if isinstance(stated, str) else None
    marks = {"config_groups": "compressed_tensors", "quant_algo": "modelopt", "quantization": "modelopt"}
    return next((method for mark, method in marks.items() if mark in section), None)


def _fp8(section: Section, source: str) -> Quantisation:
    return Quantisation("fp8_w8a8", weight_block(read(section, "weight_block_size"), "weight_block_size", source))


def _blockwise_int8(section: Section, source: str) -> Quantisation:
    return Quantisation("int8_w8a8", weight_block(read(section, "weight_block_size"), "weight_block_size", source))


def _per_channel(scheme: Scheme) -> Callable[[Section, str], Quantisation]:
    return lambda _section, _source: Quantisation(scheme, per_channel=True)


def _weight_only(section: Section, source: str) -> Quantisation:
    bits = next((read(section, name) for name in ("bits", "w_bit", "wbits") if read(section, name) is not None), None)
    return in_groups(bits, group_size(section, source), source)


METHODS: dict[str, Callable[[Section, str], Quantisation]] = {
    "fp8": _fp8,
    "w8a8_fp8": _per_channel("fp8_w8a8"),
    "fbgemm_fp8": _per_channel("fp8_w8a8"),
    "w8a8_int8": _per_channel("int8_w8a8"),
    "blockwise_int8": _blockwise_int8,
    "compressed_tensors": of_config_groups,
    "awq": _weight_only,
    "awq_marlin": _weight_only,
    "gptq": _weight_only,
    "gptq_marlin": _weight_only,
    "auto_round": _weight_only,
    "moe_wna16": _weight_only,
    "modelopt": of_modelopt,
    "modelopt_fp8": of_modelopt,
    "modelopt_mixed": of_modelopt,
}
