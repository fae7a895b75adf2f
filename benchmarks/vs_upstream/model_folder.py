"""Write a built-in model as a folder with a config.json: what upstream's scripts, and ours, take as --model."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from sglang_moe_ext.core import ModelError, MoEModel
from sglang_moe_ext.models.builtin import builtin_records
from sglang_moe_ext.models.checkpoint_names import find_builtin
from sglang_moe_ext.models.field_spellings import EXPERTS, HIDDEN, SHARED, TOP_K, WIDTH, Names
from sglang_moe_ext.models.resolve import CONFIG, resolve

_FP8 = "-FP8"
_UNTOLD = ("name", "source", "moe_layers", "decoder")
"""Of a model, what its experts' kernels do not see."""
_NUMBERS = tuple(field.name for field in fields(MoEModel) if field.name not in _UNTOLD)


def named(name: str) -> MoEModel | None:
    """The built-in model of that name; with -FP8 at its end, in the first 8-bit floating form that it is served in."""
    if found := find_builtin(name):
        return found
    for record in builtin_records():
        if name.casefold() in (f"{known}{_FP8}".casefold() for known in record.names):
            eight = [quantization for quantization in record.quantizations if quantization.scheme == "fp8_w8a8"]
            return replace(record.model, name=f"{record.model.name}{_FP8}", quantization=eight[0]) if eight else None
    return None


def write(model: MoEModel, parent: Path) -> Path:
    """`parent`/<its name>/config.json: the defaults of its class in transformers, and the numbers of its experts.

    Raises:
        ModelError: transformers has no such class, or the folder would not say the same.
    """
    folder = parent / model.name
    folder.mkdir(parents=True)
    document = _document(model)
    (folder / CONFIG).write_text(json.dumps(document, indent=1), encoding="utf-8")
    read = resolve(str(folder))
    for name in _NUMBERS:
        said, meant = getattr(read, name), getattr(model, name)
        if said != meant:
            raise ModelError(f"{model.name}: its class in transformers makes {name} {said}, not {meant}; give a folder")
    return folder


def _document(model: MoEModel) -> dict[str, Any]:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    types = {architecture: model_type for model_type, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    if model.architecture not in types:
        raise ModelError(f"{model.name}: transformers has no config class for {model.architecture}; give a folder")
    document: dict[str, Any] = AutoConfig.for_model(types[model.architecture]).to_dict()
    for names, value in (
        (EXPERTS, model.routed_experts),
        (TOP_K, model.top_k),
        (HIDDEN, model.hidden_size),
        ((*WIDTH, "intermediate_size"), model.intermediate_size),
        (SHARED, model.shared_experts),
    ):
        if stated := _first_stated(names, document):
            document[stated] = value
    return {
        **document,
        "architectures": [model.architecture],
        "dtype": model.dtype,
        "torch_dtype": model.dtype,
        **_quantized(model),
    }


def _first_stated(names: Names, document: dict[str, Any]) -> str | None:
    return next((name for name in names if name in document), None)


def _quantized(model: MoEModel) -> dict[str, Any]:
    scheme, block_shape = model.quantization.scheme, model.quantization.block_shape
    if scheme is None:
        return {}
    if scheme != "fp8_w8a8" or model.quantization.per_channel:
        raise ModelError(
            f"{model.name} is {model.quantization}: expected a form that config.json says in one line; "
            "name the model without it, and add --dtype (and --per-channel-quant)"
        )
    section: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    if block_shape is not None:
        section["weight_block_size"] = list(block_shape)
    return {"quantization_config": section}
