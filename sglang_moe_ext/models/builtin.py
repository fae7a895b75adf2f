"""The models that are known without their files, from models.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import cast

from sglang_moe_ext.core import MoEModel, Quantization

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
    """A record of models.json: the model in the quantization it is mostly served in, and the others that exist."""

    model: MoEModel
    hub_id: str
    quantizations: tuple[Quantization, ...]
    moe_layers: int
    activation: str

    @property
    def names(self) -> tuple[str, ...]:
        """What a user may call it: its name, its hub id, and that without the organisation."""
        return self.model.name, self.hub_id, self.hub_id.rpartition("/")[2]


@cache
def builtin_records() -> tuple[BuiltinModel, ...]:
    text = files(__package__).joinpath("models.json").read_text(encoding="utf-8")
    return tuple(_record(stated) for stated in json.loads(text))


def builtin_models() -> dict[str, MoEModel]:
    """By name, each in its usual quantization."""
    return {record.model.name: record.model for record in builtin_records()}


def find_builtin(name: str) -> MoEModel | None:
    """The model of that name; with `-FP8` behind it, as its makers publish it with block-wise fp8 weights."""
    wanted = name.strip().casefold()
    for record in builtin_records():
        names = {known.casefold() for known in record.names}
        if wanted in names:
            return record.model
        if QUANTIZATIONS["fp8_block"] in record.quantizations and wanted.removesuffix("-fp8") in names:
            return replace(record.model, name=f"{record.model.name}-FP8", quantization=QUANTIZATIONS["fp8_block"])
    return None


def _record(stated: dict[str, object]) -> BuiltinModel:
    quantizations = tuple(QUANTIZATIONS[code] for code in cast("list[str]", stated["quantizations"]))
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
    )
    return BuiltinModel(
        model,
        cast(str, stated["hub_id"]),
        quantizations,
        cast(int, stated["moe_layers"]),
        cast(str, stated["activation"]),
    )
