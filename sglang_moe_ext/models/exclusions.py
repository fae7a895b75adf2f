"""Whether a list of excluded modules covers a model's experts, as the engines read the list of each method."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from sglang_moe_ext.models.config_fields import Section, read_field, refusal
from sglang_moe_ext.models.expert_modules import ExpertModules, unfused_names, within_time
from sglang_moe_ext.models.module_patterns import compile_pattern, parse_targets

LISTS = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules")
"""Spellings of the list of modules that a checkpoint leaves as they were."""
MOST_ENTRIES = 1 << 18
"""384 experts of 61 layers with three projections are 70,272 names."""
Covers = Callable[[str], bool]
"""Whether a list covers the module of experts of that name."""


def list_entries(section: Section, source: str) -> list[str]:
    """What the section excludes, in all spellings of the list.

    Raises: ModelError when there are more entries than any checkpoint has modules.
    """
    entries: list[str] = []
    for name in LISTS:
        stated = read_field(section, name)
        if isinstance(stated, (list, tuple)):
            if len(stated) + len(entries) > MOST_ENTRIES:
                raise refusal(source, f"{name} has {len(stated)} entries, expected at most {MOST_ENTRIES}; shorten it")
            entries += [entry for entry in stated if isinstance(entry, str)]
    return entries


def excludes_experts(modules: ExpertModules, covers: Covers, source: str) -> bool:
    """Whether the experts of the model are left out of its quantization.

    Where a few layers alone are, the model's experts are what the others are: as a checkpoint's draft layers, or the
    first and last ones.

    Raises: ModelError when most layers, and not all, are left out: they need another table than the rest.
    """
    excluded = sum(any(map(covers, names)) for names in within_time(modules.layers, source))
    if 2 * excluded > modules.count > excluded:
        raise refusal(
            source,
            f"the experts of {excluded} of {modules.count} MoE layers are not quantized, and those of the others are: "
            "each kind reads a table of its own; state one with --shape, once with its dtype and once without",
        )
    return 0 < modules.count == excluded


def cover_by_path(entries: Iterable[str]) -> Covers:
    """As SGLang's `is_layer_skipped` does for fp8 (0.5.15 to 0.5.23, quantization/utils.py), with or without `model.`.

    An entry covers a module below it, or that contains its dotted path; one that names a part of a layer's experts
    covers all of that layer.
    """
    paths, experts = set[str](), set[str]()
    for entry in entries:
        path = entry.rstrip(".")
        bare = path.removeprefix("model.")
        paths |= {path, bare, f"model.{bare}"}
        if ".experts" in path:
            above = path[: path.index(".experts") + len(".experts")]
            experts |= {above, f"model.{above.removeprefix('model.')}"}
    return lambda name: name in experts or not paths.isdisjoint(_dotted_runs(name))


def _dotted_runs(name: str) -> Iterator[str]:
    parts = name.split(".")
    for first in range(len(parts)):
        for last in range(first, len(parts)):
            yield ".".join(parts[first : last + 1])


def cover_by_substring(entries: Iterable[str]) -> Covers:
    """As SGLang's `is_layer_skipped_awq` does for awq and moe_wna16: an entry is a part of the module's name."""
    parts = frozenset(entries)
    return lambda name: not parts.isdisjoint(_substrings(name))


def _substrings(name: str) -> Iterator[str]:
    """All of them: a name is short, and a list of entries may be long."""
    for first in range(len(name)):
        for end in range(first, len(name) + 1):
            yield name[first:end]


def cover_by_glob(entries: Iterable[str]) -> Covers:
    """As ModelOpt's lists are read (SGLang 0.5.23, modelopt_quant.py): a star matches anything, in a name or a part."""
    plain = {entry for entry in entries if re.fullmatch(r"[\w.-]*", entry)}
    globs = [
        compiled
        for entry in dict.fromkeys(entries)
        if entry not in plain and (compiled := compile_pattern(_as_pattern(entry))) is not None
    ]

    def covers(name: str) -> bool:
        names = {name, name.removeprefix("language_model."), *name.split(".")}
        return not plain.isdisjoint(names) or any(glob.fullmatch(one) for glob in globs for one in names)

    return covers


def _as_pattern(glob: str) -> str:
    return re.sub(r"\*+", "*", glob).replace(".", r"\.").replace("*", ".*")


def cover_by_target(entries: Iterable[str], source: str) -> Covers:
    """As SGLang's `should_ignore_layer` does for compressed-tensors since 0.5.18: the projections of the first expert.

    The function raises ModelError where some of the three are covered, and not all: an engine refuses such a layer.
    """
    targets = parse_targets(entries)

    def covers(experts: str) -> bool:
        covered = [targets.match_suffix(name) for name in unfused_names(experts)]
        if any(covered) and not all(covered):
            raise refusal(
                source,
                f"some projections of {experts} are not quantized, and others are: engines refuse such a layer; "
                "correct its list of ignored modules",
            )
        return all(covered)

    return covers


def cover_by_substring_of_child(entries: Iterable[str]) -> Covers:
    """As SGLang 0.5.10 to 0.5.17 read compressed-tensors' list: an entry that is a part of a name covers it."""
    entries = tuple(entries)
    plain = frozenset(entry.lower() for entry in entries if not entry.startswith("re:"))
    patterns = parse_targets(entry for entry in entries if entry.startswith("re:"))
    return lambda experts: all(
        not plain.isdisjoint(_substrings(name.lower())) or patterns.match_name(name) for name in unfused_names(experts)
    )
