"""Parse what a user states about a layer: --shape and --dtype."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from sglang_moe_ext.core import ActivationDtype, MoEShape, Quantization, Scheme
from sglang_moe_ext.models.config_fields import LARGEST, refusal, show, whole_number

SCHEMES: dict[str, Scheme] = {scheme: scheme for scheme in get_args(Scheme)}
DTYPES: dict[str, ActivationDtype] = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
}
FIELD = re.compile(r"\s*([A-Za-z_]+)\s*=\s*(\[[^\[\]]*\]|[^,\[\]]*?)\s*(?:,|$)")
EXAMPLE = "E=65,N=1536,K=2048,topk=5"


def parse_dtype_flag(
    flag: str | None,
    *,
    checkpoint: Quantization | None = None,
    per_channel: bool = False,
    block_shape: Sequence[int] | None = None,
) -> Quantization:
    """The quantization that --dtype and related flags mean; "auto" or None is that of the checkpoint.

    Where the checkpoint has the same scheme, it decides what the flags leave open.
    Raises: ModelError when the flags contradict each other.
    """
    stored = checkpoint or Quantization()
    scheme = _scheme(flag, stored)
    if scheme is None:
        if per_channel or block_shape is not None:
            raise refusal("--dtype", f"unquantized weights have no scales; choose one of {', '.join(SCHEMES)}")
        return Quantization()
    if per_channel and block_shape is not None:
        raise refusal("--dtype", "scales are per channel or per block, not both; drop one of the two flags")
    if block_shape is not None:
        return Quantization(scheme, _block(block_shape, scheme))
    known = stored if stored.scheme == scheme else Quantization(scheme)
    if scheme == "int4_w4a16" and known.per_channel:
        raise refusal(
            "the checkpoint",
            "its weights of 4 bits have one scale for each channel (group_size -1), which the Triton kernel does not "
            "read: no table matters to it; name a checkpoint in groups, or another --dtype",
        )
    if scheme == "int4_w4a16" and known.block_shape is None:
        raise refusal(
            "--dtype",
            "int4_w4a16 needs its group size: give a checkpoint that states it, or --shape with block_shape=[0,128]",
        )
    return replace(known, block_shape=None, per_channel=True) if per_channel else known


def _scheme(flag: str | None, stored: Quantization) -> Scheme | None:
    wanted = "auto" if flag is None else flag.strip().lower()
    if wanted == "auto":
        return stored.scheme
    if wanted in DTYPES:
        return None
    if wanted not in SCHEMES:
        known = ", ".join(("auto", *DTYPES, *SCHEMES))
        raise refusal("--dtype", f"unknown dtype {show(flag)}, expected one of {known}")
    return SCHEMES[wanted]


def _block(sides: Sequence[int], scheme: Scheme) -> tuple[int, int]:
    """(N, K) for 8-bit activations, (0, group) for 16-bit ones, which have groups along K alone."""
    lowest, example = (1, "[128, 128]") if Quantization(scheme).activation_bits == 8 else (0, "[0, 128]")
    if len(sides) != 2 or (sides[0] == 0) != (lowest == 0):
        raise refusal("block_shape", f"{show(list(sides))} with {scheme}, expected the like of {example}")
    return whole_number(sides[0], "N", "block_shape", at_least=lowest), whole_number(sides[1], "K", "block_shape")


@dataclass(frozen=True, slots=True)
class _Stated:
    """The fields of one --shape, as text."""

    text: str
    fields: dict[str, str]

    def number(self, name: str) -> int:
        stated = self.fields.get(name.lower())
        if stated is None:
            raise refusal("--shape", f"no {name} in {show(self.text)}, expected the like of {EXAMPLE}")
        if not re.fullmatch(r"[0-9]{1,7}", stated) or not 0 < int(stated) <= LARGEST:
            raise refusal("--shape", f"{name}={show(stated)}, expected a whole number from 1 to {LARGEST}")
        return int(stated)

    def yes(self, name: str, *, otherwise: bool) -> bool:
        stated = self.fields.get(name)
        match stated.lower() if stated is not None else None:
            case None:
                return otherwise
            case "true" | "1":
                return True
            case "false" | "0":
                return False
        raise refusal("--shape", f"{name}={show(stated)}, expected True or False")

    def block_shape(self) -> list[int] | None:
        stated = self.fields.get("block_shape")
        if stated is None or stated.lower() == "none":
            return None
        sides = re.fullmatch(r"\[\s*([0-9]{1,7})\s*,\s*([0-9]{1,7})\s*\]", stated)
        if sides is None:
            raise refusal("--shape", f"block_shape={show(stated)}, expected the like of [128,128]")
        return [int(side) for side in sides.groups()]


KEYS = ("E", "N", "K", "topk", "dtype", "block_shape", "per_channel_quant", "gated")


def parse_shape(text: str) -> MoEShape:
    """From E=65,N=1536,K=2048,topk=5[,dtype=fp8_w8a8][,block_shape=[128,128]][,per_channel_quant=True][,gated=False].

    E, N and topk as the kernel sees them: fused shared experts included, N of one expert on one rank.
    Raises: ModelError when a field is missing, unknown, stated twice or impossible.
    """
    stated = _Stated(text, _fields(text))
    flag = stated.fields.get("dtype", "bfloat16")
    quantization = parse_dtype_flag(
        flag,
        per_channel=stated.yes("per_channel_quant", otherwise=False),
        block_shape=stated.block_shape(),
    )
    shape = MoEShape(
        experts=stated.number("E"),
        intermediate_size=stated.number("N"),
        hidden_size=stated.number("K"),
        top_k=stated.number("topk"),
        quantization=quantization,
        dtype=DTYPES.get(flag.lower(), "bfloat16"),
        gated=stated.yes("gated", otherwise=True),
    )
    if shape.top_k > shape.experts:
        raise refusal("--shape", f"topk={shape.top_k} of E={shape.experts} experts, expected no more than there are")
    return shape


def _fields(text: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    known = {key.lower() for key in KEYS}
    at = 0
    while at < len(text) or at == 0:
        match = FIELD.match(text, at)
        if match is None:
            raise refusal("--shape", f"cannot read {show(text[at:])}, expected the like of {EXAMPLE}")
        key, value = match[1].lower(), match[2]
        if key not in known:
            raise refusal("--shape", f"unknown field {show(match[1])}, expected one of {', '.join(KEYS)}")
        if key in fields:
            raise refusal("--shape", f"{match[1]} is stated twice, expected once; drop one")
        fields[key] = value
        at = match.end()
    return fields
