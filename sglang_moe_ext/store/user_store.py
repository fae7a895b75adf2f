"""The user's own store: a copy of every table ever tuned, which no upgrade of an engine takes away."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_VARIABLE = "SGLANG_MOE_EXT_STORE"


def root() -> Path:
    """`$SGLANG_MOE_EXT_STORE`, or `sglang_moe_ext` in the user's data folder."""
    if chosen := os.environ.get(_VARIABLE):
        return Path(chosen)
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(data) / "sglang_moe_ext"


def tables_folder(engine: str, version_folder: str) -> Path:
    """Where the tables for that engine and that Triton lie."""
    return root() / "tables" / engine / version_folder


def all_tables(engine: str) -> Iterator[Path]:
    """Every table of that engine in the store, in order of Triton and name."""
    yield from sorted(
        path
        for path in (root() / "tables" / engine).glob("triton_*/*.json")
        if not path.name.endswith(".provenance.json")
    )
