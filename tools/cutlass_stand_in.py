"""Stands in for `cutlass` where a packed SGLang is unpacked: MLA models import it, the MoE path never calls it.

Lies in the pack as cutlass/__init__.py; FLASHINFER_USE_CUDA_NORM=1 keeps FlashInfer from calling it too.
"""

import importlib.abc
import importlib.machinery
import sys
import types


class _AnythingType(type):
    """Any attribute, subscript, union or decoration of it is itself."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything

    def __call__(cls, *arguments, **options):
        decorates = len(arguments) == 1 and callable(arguments[0]) and not options
        return arguments[0] if decorates else Anything

    def __getitem__(cls, index):
        return Anything

    def __or__(cls, other):
        return Anything

    __ror__ = __or__


class Anything(metaclass=_AnythingType):
    """The stand-in for every name."""


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path, target=None):
        if fullname.startswith("cutlass."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        module.__path__ = []


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything


sys.meta_path.append(_Finder())
