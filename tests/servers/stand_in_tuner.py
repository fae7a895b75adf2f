"""Settings of a server that tunes before it loads, with a stand-in of what measures: there is no GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from sglang_moe_ext.tables import config_table
from tests.servers import tables

SCRIPT = Path(__file__).parents[1] / "serving" / "children" / "stand_in_tuner.py"


def settings(folder: Path, does: str = "tune") -> Mapping[str, str]:
    """The variables of a server whose store is that folder; the stand-in puts the tests' table there, or hangs."""
    for name, text in (
        ("does", does),
        ("place", str(tables.path_in(folder))),
        ("table", config_table.to_json(tables.TABLE)),
    ):
        (folder / name).write_text(text)
    return {
        "SGLANG_MOE_EXT_STORE": str(folder),
        "SGLANG_MOE_EXT_AUTOTUNE": "60",
        "MOE_ON_CPU_TUNER": str(SCRIPT),
        "STAND_IN": str(folder),
    }


def runs(folder: Path) -> list[tuple[int, list[str]]]:
    """Process id and flags of each run."""
    file = folder / "runs"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(int(pid), json.loads(flags)) for pid, _, flags in (line.partition(" ") for line in lines)]
