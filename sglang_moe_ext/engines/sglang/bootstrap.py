"""Bring the parts of SGLang that we ask to life in a process of our own, also where there is no GPU.

Only child processes use this: what it changes in the engine must never reach a server.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any, NoReturn

from sglang_moe_ext.core import EngineError

_COMPILED_OPERATORS = "sgl_kernel"
# SGLang up to 0.5.10 brings its own stand-in for this one when the import fails.
_LEFT_TO_THE_ENGINE = "sgl_kernel.scalar_type"


class _Absent(types.ModuleType):
    """A stand-in for the compiled operators: every name is there, and raises when it is called."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args: object, **kwargs: object) -> NoReturn:
            raise EngineError(f"{self.__name__}.{name} needs a GPU, and this machine has none")

        return absent


class _AbsentFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != _COMPILED_OPERATORS or fullname == _LEFT_TO_THE_ENGINE:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__["__version__"] = "0"


def has_gpu() -> bool:
    """True where torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def import_engine(module: str) -> Any:
    """The engine's module of that name. Without a GPU, stand-ins take the place of its compiled operators.

    Raises:
        EngineError: it cannot be imported.
    """
    if not has_gpu():
        allow_absent_operators()
    try:
        return importlib.import_module(module)
    except Exception as error:  # an engine can fail to import in any way; the caller needs one line
        raise EngineError(f"cannot import {module}: {type(error).__name__}: {error}") from error


def allow_absent_operators() -> None:
    """Let stand-ins take the place of the engine's compiled operators, where those cannot be imported."""
    try:
        importlib.import_module(_COMPILED_OPERATORS)
    except ImportError:
        for name in [name for name in sys.modules if name.partition(".")[0] == _COMPILED_OPERATORS]:
            del sys.modules[name]
        sys.meta_path.insert(0, _AbsentFinder())


def publish_server_args(*, deterministic: bool = False) -> None:
    """Give the process the server's arguments: the engine's lookup and its kernels read them, and raise without."""
    server_args = import_engine("sglang.srt.server_args")
    device = {} if has_gpu() else {"device": "cpu"}
    arguments = server_args.ServerArgs(model_path="dummy", **device)
    arguments.enable_deterministic_inference = deterministic
    server_args.set_global_server_args_for_scheduler(arguments)
