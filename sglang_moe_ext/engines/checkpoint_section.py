"""The quantization section of a config.json that says what a `Quantization` says, as an engine reads it."""

from __future__ import annotations

from typing import Any

from sglang_moe_ext.core import CheckpointFormat, Quantization
from sglang_moe_ext.engines.quantization_flag import TRITON_METHOD

Section = dict[str, Any]


def describe(quantization: Quantization) -> tuple[Section | None, str | None] | None:
    """(The section, None for weights in 16 bits; the value of --quantization that goes with it).

    None where the checkpoint's own section may say more than is known here, so that an engine may choose otherwise.
    """
    if quantization.scheme is None:
        return None, None
    section = _section(quantization)
    stored = quantization.checkpoint
    flag = TRITON_METHOD if stored is not None and stored.method == TRITON_METHOD else None
    return None if section is None else (section, flag)


def _section(quantization: Quantization) -> Section | None:
    stored = quantization.checkpoint
    if stored is None:  # a user stated the layer: float8 in blocks, or of a tensor, is what `fp8` stands for
        is_fp8 = quantization.scheme == "fp8_w8a8" and not quantization.per_channel
        return _fp8(quantization) if is_fp8 else None
    method = stored.method
    if method == TRITON_METHOD:
        method = "gptq" if stored.symmetric or stored.bits != 4 else "awq"
    match method:
        case "fp8":
            return _fp8(quantization)
        case "awq":
            return _awq(stored)
        case "gptq":
            return _gptq(stored)
        case "compressed_tensors":
            return _compressed_tensors(quantization, stored)
        case _:
            return None


def _fp8(quantization: Quantization) -> Section:
    block = quantization.block_shape
    blocks = {} if block is None else {"weight_block_size": list(block)}
    return {"quant_method": "fp8", "activation_scheme": "dynamic"} | blocks


def _awq(stored: CheckpointFormat) -> Section:
    return {
        "quant_method": "awq",
        "bits": stored.bits,
        "group_size": _group(stored),
        "zero_point": not stored.symmetric,
        "version": "gemm",
        "modules_to_not_convert": None,
        "lm_head": False,
    }


def _gptq(stored: CheckpointFormat) -> Section:
    return {
        "quant_method": "gptq",
        "bits": stored.bits,
        "group_size": _group(stored),
        "sym": stored.symmetric,
        "desc_act": stored.activation_order,
        "lm_head": False,
        "dynamic": {},
    }


def _group(stored: CheckpointFormat) -> int:
    return -1 if stored.group is None else stored.group


def _compressed_tensors(quantization: Quantization, stored: CheckpointFormat) -> Section | None:
    match quantization.scheme:
        case "int4_w4a16" | "int8_w8a16":
            weights: Section = {
                "type": "int",
                "num_bits": stored.bits,
                "strategy": "channel" if stored.group is None else "group",
                "group_size": stored.group,
                "symmetric": stored.symmetric,
            } | ({"actorder": "group"} if stored.activation_order else {})
            activations, form = None, "pack-quantized"
        case "fp8_w8a8":
            strategy = quantization.scales
            weights = {"type": "float", "num_bits": 8, "strategy": strategy, "symmetric": True}
            activations = weights | {"strategy": "tensor" if strategy == "tensor" else "token", "dynamic": True}
            if quantization.block_shape is not None:
                weights |= {"block_structure": list(quantization.block_shape)}
                activations |= {"strategy": "group", "group_size": quantization.block_shape[1]}
            form = "float-quantized"
        case _:
            return None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "format": form, "ignore": [], "config_groups": {"group_0": group}}
