"""Reads the quantization of experts off a section of Intel AutoRound: bits and groups that differ by module."""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sglang_moe_ext.core import CheckpointFormat, Quantization
from sglang_moe_ext.models import expert_modules
from sglang_moe_ext.models.config_fields import Section, read_field, refusal, show
from sglang_moe_ext.models.expert_modules import MOST_ENTRIES, ExpertModules
from sglang_moe_ext.models.weight_groups import group_quantization, group_size, refuse_other_kernel

METHOD = "auto_round"
_MARKS = frozenset("*+?^$()[]{}|\\")
"""A key with one of these is a pattern."""
_PLAIN_BITS = 16


@dataclass(frozen=True, slots=True)
class _Overrides:
    """`extra_config`: by name, sorted, and by pattern in the order of the section."""

    stated: Mapping[str, Section]
    names: Sequence[str]
    patterns: Sequence[tuple[re.Pattern[str], str]]

    def below(self, experts: str) -> Iterator[str]:
        """Keys that begin with the module's name."""
        for name in self.names[bisect.bisect_left(self.names, experts) :]:
            if not name.startswith(experts):
                return
            yield name

    def match_pattern(self, name: str) -> str | None:
        return next((key for pattern, key in self.patterns if pattern.fullmatch(name)), None)


def parse_auto_round(section: Section, modules: ExpertModules, source: str) -> Quantization:
    """As `AutoRoundConfig.get_layer_config` of SGLang 0.5.23 and vLLM's INCConfig answer for each layer's experts.

    Raises: ModelError when layers differ, or are stored as no kernel of ours reads.
    """
    data_type = read_field(section, "data_type")
    if data_type not in (None, "int"):
        raise refuse_other_kernel(f"auto-round {show(data_type)}", source)
    overrides, blocks = _parse_overrides(section, source), _blocks(section)
    found = Counter(
        _read_layer(names, section, overrides, blocks, source)
        for names in expert_modules.within_time(modules.layers, source)
    )
    if len(found) > 1:
        raise expert_modules.refuse_mixed(found, "auto-round", source)
    return next(iter(found))


def _parse_overrides(section: Section, source: str) -> _Overrides:
    extra = read_field(section, "extra_config")
    stated = {key: value for key, value in extra.items() if isinstance(key, str)} if isinstance(extra, Mapping) else {}
    if len(stated) > MOST_ENTRIES:
        raise refusal(source, f"extra_config has {len(stated)} entries, expected at most {MOST_ENTRIES}; shorten it")
    is_pattern = {key: not _MARKS.isdisjoint(key) for key in stated}
    patterns = [
        (compiled, key)
        for key in stated
        if is_pattern[key] and (compiled := expert_modules.compile_pattern(key)) is not None
    ]
    return _Overrides(stated, sorted(stated), patterns)


def _blocks(section: Section) -> tuple[str, ...]:
    """Prefixes of the modules that are quantized; none: all."""
    stated = read_field(section, "block_name_to_quantize") or read_field(section, "to_quant_block_names")
    if isinstance(stated, str):
        return tuple(part.strip() for part in stated.split(",") if part.strip())
    return tuple(name for name in stated if isinstance(name, str)) if isinstance(stated, (list, tuple)) else ()


def _read_layer(
    names: tuple[str, ...], section: Section, overrides: _Overrides, blocks: tuple[str, ...], source: str
) -> Quantization:
    is_quantized = not blocks or any(name.startswith(block) for name in names for block in blocks)
    keys = next((list(found) for name in names if (found := tuple(overrides.below(name)))), [])
    if not keys:
        matched = next((key for name in names if (key := overrides.match_pattern(name)) is not None), None)
        keys = [] if matched is None else [matched]
    kinds = {_quantization(section, overrides.stated[key], is_quantized, source) for key in keys}
    if len(kinds) > 1:
        raise refusal(source, f"extra_config stores the experts of {names[0]} differently; engines refuse that")
    return kinds.pop() if kinds else _quantization(section, None, is_quantized, source)


def _quantization(section: Section, override: Section, is_quantized: bool, source: str) -> Quantization:
    """What the section, with the override in front of it, makes of a module."""
    merged = dict(override) if isinstance(override, Mapping) else {}
    for name in ("bits", "group_size", "sym"):
        if merged.get(name) is None:
            merged[name] = read_field(section, name) if is_quantized else None
    bits = merged["bits"] if is_quantized or merged["bits"] is not None else _PLAIN_BITS
    if isinstance(bits, int) and bits >= _PLAIN_BITS:
        return Quantization()
    group = group_size(merged, source)
    stored = CheckpointFormat(METHOD, bits if isinstance(bits, int) else 0, group, symmetric=merged["sym"] is not False)
    return group_quantization(bits, group, stored, source)
