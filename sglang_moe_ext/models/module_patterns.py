"""Names and patterns of a checkpoint's modules, matched without running a pattern that may never end."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_MOST_REPEATS, _LONGEST_PATTERN = 4, 400
_REPEATED_GROUP = re.compile(r"\)\s*[*+{]")
_REPEAT = re.compile(r"(?<!\\)[*+]|(?<!\\)\{\d*,\d*\}")


def compile_pattern(pattern: str) -> re.Pattern[str] | None:
    """None for one that is no pattern, or that a stranger may have written to never end.

    Without repeated groups and with few repeats, matching a module's name takes polynomial time of a small degree.
    """
    if len(pattern) > _LONGEST_PATTERN or _REPEATED_GROUP.search(pattern):
        return None
    if len(_REPEAT.findall(pattern)) > _MOST_REPEATS:
        return None
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return None


def names_experts(pattern: str) -> bool:
    """True where a pattern speaks of routed experts of all layers: for patterns that are not run."""
    is_about_experts = "experts" in pattern and "shared" not in pattern and "(?!" not in pattern
    return is_about_experts and not any(letter.isdigit() for letter in pattern.replace("[0-9]", ""))


@dataclass(frozen=True, slots=True)
class Targets:
    """Targets of compressed-tensors: names, and patterns behind `re:`. `unread` are patterns that are not run."""

    names: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]
    unread: tuple[str, ...]

    def match_name(self, name: str) -> bool:
        """Whether one of them is the name, or a pattern that matches from its first letter on."""
        return name in self.names or self._match_pattern(name)

    def match_suffix(self, name: str) -> bool:
        """The same, where a name may also lack what stands before one of its dots."""
        parts = name.split(".")
        suffixes = (".".join(parts[first:]) for first in range(len(parts)))
        return not self.names.isdisjoint(suffixes) or self._match_pattern(name)

    def _match_pattern(self, name: str) -> bool:
        return any(pattern.match(name) for pattern in self.patterns) or any(map(names_experts, self.unread))


def parse_targets(stated: Iterable[str]) -> Targets:
    names, patterns, unread = set[str](), list[re.Pattern[str]](), list[str]()
    for target in stated:
        if not target.startswith("re:"):
            names.add(target)
        elif (compiled := compile_pattern(target[3:])) is not None:
            patterns.append(compiled)
        else:
            unread.append(target)
    return Targets(frozenset(names), tuple(patterns), tuple(unread))
