"""The models that are known without their config.json: the records of models.json, and decoders.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any, cast

from sglang_moe_ext.core import DecoderShape, MoEModel, Quantization

QUANTIZATIONS: dict[str, Quantization] = {
    "bf16": Quantization(),
    "fp8_block": Quantization("fp8_w8a8", (128, 128)),
    "fp8_channel": Quantization("fp8_w8a8", per_channel=True),
    "fp8_tensor": Quantization("fp8_w8a8"),
    "int8_channel": Quantization("int8_w8a8", per_channel=True),
    "int4_group32": Quantization("int4_w4a16", (0, 32)),
    "int4_group128": Quantization("int4_w4a16", (0, 128)),
}


@dataclass(frozen=True, slots=True)
class BuiltinModel:
    """A record of models.json: the model in its usual quantization, and the other quantizations that exist.

    `published_fp8` is what the model's publisher means by `-FP8`. `engines` have a class for the architecture.
    `format_elsewhere`: what other publishers store it in, where that does not run the fused Triton kernel.
    """

    model: MoEModel
    hub_id: str
    quantizations: tuple[Quantization, ...]
    activation: str
    published_fp8: Quantization | None
    engines: tuple[str, ...]
    format_elsewhere: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What a user may call it: its name, its hub id, and the hub id without the organisation."""
        return self.model.name, self.hub_id, self.hub_id.rpartition("/")[2]


@cache
def builtin_records() -> tuple[BuiltinModel, ...]:
    """Every record, in the order of the file."""
    text = files(__package__).joinpath("models.json").read_text(encoding="utf-8")
    return tuple(_record(stated) for stated in json.loads(text))


def builtin_models() -> dict[str, MoEModel]:
    """By name, each in its usual quantization."""
    return {record.model.name: record.model for record in builtin_records()}


@cache
def _decoders() -> dict[str, DecoderShape]:
    """What stands around the experts, of the models of which that is known, by name."""
    text = files(__package__).joinpath("decoders.json").read_text(encoding="utf-8")
    return {stated["name"]: _decoder(stated) for stated in json.loads(text)}


def _decoder(stated: dict[str, Any]) -> DecoderShape:
    return DecoderShape(**{item.name: stated[item.name] for item in fields(DecoderShape) if item.name in stated})


def _record(stated: dict[str, object]) -> BuiltinModel:
    codes = cast("list[str]", stated["quantizations"])
    quantizations = tuple(QUANTIZATIONS[code] for code in codes)
    model = MoEModel(
        name=cast(str, stated["name"]),
        architecture=cast(str, stated["architecture"]),
        routed_experts=cast(int, stated["experts"]),
        top_k=cast(int, stated["top_k"]),
        hidden_size=cast(int, stated["hidden_size"]),
        intermediate_size=cast(int, stated["intermediate_size"]),
        shared_experts=cast(int, stated["shared_experts"]),
        gated=cast(bool, stated["gated"]),
        quantization=quantizations[0],
        zero_experts=cast(int, stated.get("zero_experts", 0)),
        source=f"built in, checked {stated['checked']}: {stated['source']}",
        moe_layers=cast(int, stated["moe_layers"]),
        decoder=_decoders().get(cast(str, stated["name"])),
    )
    fp8 = cast("str | None", stated.get("fp8", "fp8_block" if "fp8_block" in codes else None))
    return BuiltinModel(
        model,
        hub_id=cast(str, stated["hub_id"]),
        quantizations=quantizations,
        activation=cast(str, stated["activation"]),
        published_fp8=None if fp8 is None else QUANTIZATIONS[fp8],
        engines=tuple(cast("list[str]", stated.get("engines", ["sglang", "vllm"]))),
        format_elsewhere=cast("str | None", stated.get("format_elsewhere")),
    )
