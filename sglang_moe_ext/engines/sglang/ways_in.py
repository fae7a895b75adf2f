"""Which of our ways into SGLang an environment has: the startup file, the entry point; what neither of them reaches."""

from __future__ import annotations

import importlib.metadata
import site
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext.engines.sglang.installation import Installation

GROUP = "sglang.srt.plugins"
"""The engine's group of entry points, and since 0.5.11 its module that calls them."""
ENTRY_POINT = "sglang_moe_ext"
STARTUP_FILE = "sglang_moe_ext_startup.pth"


@dataclass(frozen=True, slots=True)
class WaysIn:
    """`startup_file`: the one that each process of this Python runs. `entry_point`: the engine calls ours."""

    startup_file: Path | None
    entry_point: bool

    @property
    def unreached(self) -> str | None:
        """The processes that run without us, or None."""
        if self.startup_file is not None:
            return None
        return "bench_one_batch, Ray's SchedulerActor and scripts" if self.entry_point else "all processes"


def found(engine: Installation) -> WaysIn:
    """What this Python and that engine have."""
    return WaysIn(_startup_file(), calls_plugins(engine) and _is_entry_point_installed())


def calls_plugins(engine: Installation) -> bool:
    """Whether that release has the module that calls entry points."""
    return (engine.root.parent / GROUP.replace(".", "/") / "__init__.py").is_file()


def _is_entry_point_installed() -> bool:
    return any(point.name == ENTRY_POINT for point in importlib.metadata.entry_points(group=GROUP))


def _startup_file() -> Path | None:
    """Python reads .pth files in its site folders alone: in a folder of PYTHONPATH one is never run."""
    folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    return next((path for folder in folders if (path := Path(folder) / STARTUP_FILE).is_file()), None)
