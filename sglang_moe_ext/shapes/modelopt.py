"""How NVIDIA ModelOpt stores experts, out of config.json or hf_quant_config.json."""

from __future__ import annotations

from collections.abc import Mapping

from sglang_moe_ext.core import Quantisation
from sglang_moe_ext.shapes.fields import Section, read, refusal, shown
from sglang_moe_ext.shapes.scales import experts_left_out, group_size, names_experts, other_kernel

MIXED = "MIXED_PRECISION"
BLOCK_SIDE = 128
"""Where a block-wise algorithm states no group_size (SGLang 0.5.23, modelopt_quant.py)."""


def of_modelopt(section: Section, source: str) -> Quantisation:
    inner = read(section, "quantization")
    section = inner if isinstance(inner, Mapping) else section
    if experts_left_out(section):
        return Quantisation()
    if read(section, "quant_algo") == MIXED:
        return _of_mixed(read(section, "quantized_layers"), source)
    return _of_algorithm(section, source)


def _of_algorithm(section: Section, source: str) -> Quantisation:
    match read(section, "quant_algo"):
        case "FP8" | None:
            return Quantisation("fp8_w8a8")
        case "FP8_PER_CHANNEL_PER_TOKEN":
            return Quantisation("fp8_w8a8", per_channel=True)
        case "FP8_PB_WO" | "FP8_BLOCK_SCALES":
            side = group_size(section, source) or BLOCK_SIDE
            return Quantisation("fp8_w8a8", (side, side))
        case algorithm:
            raise other_kernel(f"modelopt {shown(algorithm)}", source)


def _of_mixed(layers: object, source: str) -> Quantisation:
    """An algorithm a layer; those without one are not quantised."""
    of_experts = {
        _of_algorithm(layer, source)
        for name, layer in (layers.items() if isinstance(layers, Mapping) else ())
        if isinstance(layer, Mapping) and names_experts(str(name))
    }
    if len(of_experts) > 1:
        raise refusal(source, "modelopt stores the experts of different layers differently; state them with --shape")
    return of_experts.pop() if of_experts else Quantisation()
