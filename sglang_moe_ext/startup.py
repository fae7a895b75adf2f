"""What each Python runs at its start, from a .pth file: waits for upstream's benchmark scripts, patches what they load.

Nothing is imported before they do, not even `__future__`: all processes of the environment pay for what stands here.
"""

import os
import sys

TYPE_CHECKING = False  # typing's own would load typing
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

SWITCH = "SGLANG_MOE_EXT_DISABLE"
MODULE = "common_utils"
FOLDER = "fused_moe_triton"
FUNCTION = "get_model_config"


class ScriptFinder:
    """Finds the module where the path has it, if it is upstream's, and then patches it as soon as it has been run."""

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if fullname != MODULE:
            return None
        try:
            return _spec(path, target)
        except Exception:  # an import that would work without us must work with us
            return None


def _spec(path: "Sequence[str] | None", target: "ModuleType | None") -> "ModuleSpec | None":
    from importlib.machinery import PathFinder

    spec = PathFinder.find_spec(MODULE, path, target)
    if spec is None or spec.origin is None or spec.loader is None:
        return None
    if not spec.origin.endswith(os.sep + os.path.join(FOLDER, f"{MODULE}.py")):
        return None
    run = spec.loader.exec_module

    def exec_module(module: "ModuleType") -> None:
        run(module)
        _patch(module)

    vars(spec.loader)["exec_module"] = exec_module  # the loader is this spec's alone
    return spec


def _patch(module: "ModuleType") -> None:
    try:
        from sglang_moe_ext.engines.sglang.benchmark_scripts import patched

        names = vars(module)
        if callable(names.get(FUNCTION)):
            names[FUNCTION] = patched(names[FUNCTION])
    except Exception as error:  # the script runs as if we were not installed
        import logging

        logging.getLogger(__name__).warning("sglang-moe-ext cannot patch %s: %r", module.__file__, error)


def install() -> None:
    """Put the finder first, once; SGLANG_MOE_EXT_DISABLE=1 keeps it out."""
    if os.environ.get(SWITCH, "0") not in ("", "0"):
        return
    if not any(isinstance(finder, ScriptFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, ScriptFinder())
