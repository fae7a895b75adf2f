"""Call a function with a module as soon as Python has executed it, before the import returns.

Nothing is imported before that, not even `__future__`: every process of the environment pays for it.
"""

import sys

TYPE_CHECKING = False  # typing's own would load typing
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


class ImportHook:
    """Finds the modules that are awaited where the path has them. An import that works without us works with us."""

    def __init__(self) -> None:
        self.awaited: dict[str, Callable[[ModuleType], None]] = {}

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if fullname not in self.awaited:
            return None
        try:
            return _spec(fullname, path, target, self.awaited[fullname])
        except Exception:
            return None


def _spec(
    fullname: str, path: "Sequence[str] | None", target: "ModuleType | None", act: "Callable[[ModuleType], None]"
) -> "ModuleSpec | None":
    from importlib.machinery import PathFinder

    spec = PathFinder.find_spec(fullname, path, target)
    if spec is None or spec.loader is None:
        return None
    execute = spec.loader.exec_module

    def exec_module(module: "ModuleType") -> None:
        execute(module)
        act(module)

    vars(spec.loader)["exec_module"] = exec_module  # the loader is this spec's alone
    return spec


def on_import(fullname: str, act: "Callable[[ModuleType], None]") -> None:
    """Call `act`, which must not raise, with the module of that name once it has been executed.

    Who was first to expect a module acts on it.
    """
    finder = next((finder for finder in sys.meta_path if isinstance(finder, ImportHook)), None)
    if finder is None:
        finder = ImportHook()
        sys.meta_path.insert(0, finder)
    finder.awaited.setdefault(fullname, act)
