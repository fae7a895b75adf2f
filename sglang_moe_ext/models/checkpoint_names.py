"""Match the name of a checkpoint, with the suffixes that publishers add, to a built-in model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from sglang_moe_ext.core import MoEModel, Quantization
from sglang_moe_ext.models.builtin import QUANTIZATIONS, BuiltinModel, builtin_records

_SEPARATOR = r"[-_. ]"
_SAME_EXPERTS = re.compile(
    rf"{_SEPARATOR}(instruct|thinking|reasoning|chat|base|it|pt|hf|zero|exp|terminus|speciale|bf16|fp16"
    r"|v0\.\d|\d{4}|\d+[km])$"
)
"""Suffixes of checkpoints that differ from the built-in one in training, not in the shape of their experts."""


@dataclass(frozen=True, slots=True)
class QuantizationSuffix:
    """A suffix that says how the weights are stored; `code` as in models.json. `why` where it leaves something open."""

    pattern: re.Pattern[str]
    code: str
    why: str = ""


def _suffix(words: str) -> re.Pattern[str]:
    return re.compile(rf"{_SEPARATOR}({words})$")


_GROUP_128 = "groups of 128 are usual and were not read from the checkpoint"
QUANTIZED = (
    QuantizationSuffix(_suffix(r"fp8[-_]dynamic"), "fp8_channel"),
    QuantizationSuffix(_suffix(r"fp8[-_]block"), "fp8_block"),
    QuantizationSuffix(_suffix(r"(quantized[-_.])?w8a8|(w8a8[-_])?int8"), "int8_channel"),
    QuantizationSuffix(
        _suffix(
            r"(int4[-_]|\d?bit[-_])?(awq|gptq|autoround|auto[-_]round)([-_](int4|4bit|w4a16|int4[-_]w4a16))?"
            r"|(quantized[-_.])?(int4[-_])?w4a16(_g128)?"
        ),
        "int4_group128",
        _GROUP_128,
    ),
)
"""In this order; `-FP8` alone is not here, since publishers mean different things by it."""

NOT_TRITON = {
    "GGUF": _suffix(r"(i1[-_])?gguf"),
    "NVFP4": _suffix(r"nvfp4|fp4"),
    "MXFP4": _suffix(r"mxfp4"),
    "bitsandbytes": _suffix(r"(unsloth[-_])?bnb[-_](4|8)bit"),
    "MLX": _suffix(r"mlx([-_]\d(\.\d+)?bit)?|\d(\.\d+)?bit([-_]mlx)?"),
    "EXL": _suffix(r"exl[23]"),
    "8-bit GPTQ": _suffix(r"gptq[-_](int8|8bit)"),
}
"""Formats whose experts do not run the fused Triton kernel."""


@dataclass(frozen=True, slots=True)
class NameMatch:
    """The built-in model that a checkpoint's name stands for.

    `is_exact`: it is one of the model's own names. Else `note` says what was concluded from the name.
    """

    model: MoEModel
    is_exact: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class FormatWithoutTables:
    """The shape is known, but the name says a format whose experts do not run the fused Triton kernel."""

    model: MoEModel
    format: str


def match_name(name: str) -> NameMatch | FormatWithoutTables | None:
    """The built-in model with that name; else the one that is left without known suffixes and the publisher."""
    wanted = name.strip().casefold()
    names = {known.casefold(): record for record in builtin_records() for known in record.names}
    if wanted in names:
        return NameMatch(names[wanted].model, is_exact=True)
    record = names.get(wanted.removesuffix("-fp8"))
    if record is not None and record.published_fp8 is not None:
        model = replace(record.model, name=f"{record.model.name}-FP8", quantization=record.published_fp8)
        return NameMatch(model, is_exact=True)
    return _match_suffixes(name, wanted, names)


def find_builtin(name: str) -> MoEModel | None:
    """The model of `match_name`, where there is one."""
    match = match_name(name)
    return match.model if isinstance(match, NameMatch) else None


def _match_suffixes(name: str, wanted: str, names: dict[str, BuiltinModel]) -> NameMatch | FormatWithoutTables | None:
    tail = wanted.rpartition("/")[2]
    roots = {_root(known): record for known, record in reversed(names.items()) if "/" not in known}
    for format_name, pattern in NOT_TRITON.items():
        if (record := _known(pattern.sub("", tail), names, roots)) and pattern.search(tail):
            return FormatWithoutTables(record.model, format_name)
    for suffix in QUANTIZED:
        if suffix.pattern.search(tail) and (record := _known(suffix.pattern.sub("", tail), names, roots)):
            return _matched(name, record, QUANTIZATIONS[suffix.code], suffix.why)
    if tail.endswith("-fp8") and (record := _known(tail.removesuffix("-fp8"), names, roots)):
        published = record.published_fp8
        return None if published is None else _matched(name, record, published, "")
    record = _known(tail, names, roots)
    return None if record is None else _matched(name, record, record.model.quantization, "")


def _known(tail: str, names: dict[str, BuiltinModel], roots: dict[str, BuiltinModel]) -> BuiltinModel | None:
    """The model of that name, or the one that is left without the suffixes that change no shape."""
    return names.get(tail) or roots.get(_root(tail))


def _root(name: str) -> str:
    shorter = _SAME_EXPERTS.sub("", name)
    return name if shorter == name else _root(shorter)


def _matched(name: str, record: BuiltinModel, quantization: Quantization, why: str) -> NameMatch:
    model = replace(record.model, name=name.strip(), quantization=quantization)
    note = (
        f"{model.name} has the experts of the built-in {record.model.name} by its name ({quantization}); "
        f"its config.json was not read{f', and {why}' if why else ''}"
    )
    return NameMatch(model, is_exact=False, note=note)


def close_names(name: str, count: int = 3) -> list[str]:
    """The names of built-in models that are most like `name`, best first."""
    wanted = name.strip().casefold().rpartition("/")[2][:200]
    names = {known.casefold(): known for record in builtin_records() for known in record.names if "/" not in known}
    ranked = sorted(names, key=lambda known: (-_likeness(_root(wanted), _root(known)), len(known), known))
    likely = [known for known in ranked if _likeness(_root(wanted), _root(known)) >= _LEAST_LIKENESS]
    return list(_once(likely, names))[:count]


_LEAST_LIKENESS = 0.6


def _likeness(one: str, other: str) -> float:
    import difflib

    return difflib.SequenceMatcher(None, one, other).ratio()


def _once(likely: Iterable[str], names: dict[str, str]) -> Iterable[str]:
    """Each model by the first of its names."""
    owners = {known.casefold(): record.model.name for record in builtin_records() for known in record.names}
    return dict.fromkeys(names[owners[known].casefold()] for known in likely)
