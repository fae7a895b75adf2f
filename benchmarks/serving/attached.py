"""In a child: start as an installation would, and tell whether our hooks are in the engine, and what was said of it."""

from __future__ import annotations

import importlib
import logging
import site
import sys
from pathlib import Path
from typing import Any

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines.sglang import installation
from sglang_moe_ext.engines.sglang.hook_points import LAUNCH, LOOKUP
from sglang_moe_ext.engines.sglang.installation import SglangInstallation

PACKAGING = Path(__file__).parents[2] / "packaging"
HOOKED = (LOOKUP, LAUNCH)
HOOKS = "sglang_moe_ext.serving.attach"
_TABLES = "MoE kernel config"
"""In what the engine says of a table that it read, or did not find."""


class Said(logging.Handler):
    """Keeps what our package logged, and what the engine said of tables."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        is_ours = record.name.partition(".")[0] == "sglang_moe_ext"
        if (is_ours or _TABLES in line) and line not in self.lines:
            self.lines.append(line)


def begin() -> Said:
    """Before the engine is imported: run the startup file, which a checkout on PYTHONPATH does not bring about."""
    said = Said()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger().addHandler(said)
    site.addsitedir(str(PACKAGING))
    return said


def engine_here() -> SglangInstallation:
    """Raises EngineError where there is none."""
    engine = installation.find()
    if engine is None:
        raise EngineError("SGLang is not installed here: this benchmark measures it, so run it where it is")
    return engine


def is_active(engine: SglangInstallation) -> bool:
    """Whether the layer calls ours.

    Raises:
        EngineError: one hook is in and the other is not.
    """
    layer = importlib.import_module(engine.layer_module)
    ours = [name for name in HOOKED if not _is_the_engines(getattr(layer, name), engine.root)]
    if ours and len(ours) != len(HOOKED):
        raise EngineError(f"{engine.layer_module}: only {ours[0]} is ours, expected both hooks or none")
    return bool(ours)


def _is_the_engines(function: Any, root: Path) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and Path(code.co_filename).resolve().is_relative_to(root)


def attached_ms() -> float | None:
    """What putting the hooks in added to the start; None where nothing was put in."""
    state = getattr(sys.modules.get(HOOKS), "state", None)
    return float(state().ms) if state is not None and state().is_active else None
