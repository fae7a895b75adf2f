"""Read a server's log: whether the plugin is active in it, which tables it names, and what went wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass

LONGEST_LINE = 400
_ACTIVE = "is active in "
_TOLD = ("sglang-moe-ext", "MoE kernel config", "sub-optimal")
_WRONG = ("Traceback", " ERROR ", "Error:", "CUDA error", "out of memory")
_MOST_LINES = 12
_STAMP = re.compile(r".*\[\d{4}-\d\d-\d\d [^\]]*\] ")
"""A progress bar, which ends no line, may stand before it."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a server's log has of the plugin and of tables, and of errors; each line once, without its time."""

    is_active: bool
    tables: tuple[str, ...]
    errors: tuple[str, ...]


def read_log(text: str) -> Said:
    """Of the whole log."""
    lines = list(dict.fromkeys(_STAMP.sub("", line.strip())[:LONGEST_LINE] for line in text.splitlines()))
    return Said(
        any(_ACTIVE in line and _TOLD[0] in line for line in lines),
        tuple(line for line in lines if any(words in line for words in _TOLD))[:_MOST_LINES],
        tuple(line for line in lines if any(words in line for words in _WRONG))[:_MOST_LINES],
    )
