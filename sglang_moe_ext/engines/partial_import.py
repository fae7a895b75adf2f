"""Run functions of an engine's own source files without importing the engine, which takes ten seconds and more.

Only child processes use this. A name that is neither defined in the file nor given ends the attempt: what runs is the
engine's code as it stands on disk, or nothing.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from sglang_moe_ext.core import EngineError

_BUILT_IN = frozenset(dir(builtins)) | {"__file__", "__name__"}
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def load(
    name: str, file: Path, functions: Iterable[str], given: Mapping[str, Any], signatures: Iterable[str] = ()
) -> ModuleType:
    """A module of that name with those functions, and all of the file that they use.

    Args:
        given: what stands for the names that the file imports from elsewhere.
        signatures: functions, and methods as `Class.method`, of which only the parameters are wanted.

    Raises:
        EngineError: the file has no such function, or one that needs what is not given.
    """
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    except (OSError, SyntaxError) as error:
        raise EngineError(f"cannot read {file}: {error}") from error
    module = ModuleType(name)
    module.__dict__.update(given)
    module.__file__ = str(file)
    parts = [*_needed(tree, list(functions), set(given), file), *(_signature(tree, it, file) for it in signatures)]
    body = ast.Module(body=parts, type_ignores=[])
    flags = __future__.annotations.compiler_flag
    exec(compile(ast.fix_missing_locations(body), str(file), "exec", flags, dont_inherit=True), module.__dict__)
    sys.modules[name] = module
    return module


def stand_in(name: str, **attributes: Any) -> ModuleType:
    """A module that has those attributes and no other, under that name."""
    module = ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module
    return module


def stand_in_for_torch() -> None:
    """A torch that sees no GPU, traces nothing, and knows nothing else."""
    cuda = SimpleNamespace(is_available=lambda: False, is_initialized=lambda: False)
    stand_in("torch", version=SimpleNamespace(hip=None), cuda=cuda)
    stand_in("torch.compiler", is_compiling=lambda: False)


def _needed(tree: ast.Module, wanted: list[str], given: set[str], file: Path) -> list[ast.stmt]:
    """The statements of the file that define the wanted names and what these use, in their order."""
    places = {name: statement for statement in tree.body for name in _defines(statement)}
    needed: dict[str, ast.stmt] = {}
    while wanted:
        name = wanted.pop()
        if name in needed or name in given:
            continue
        if name not in places:
            raise EngineError(f"{file} has no {name}, or takes it from elsewhere")
        needed[name] = places[name]
        wanted += [it for it in _uses(places[name]) if it not in _BUILT_IN]
    kept = {id(statement) for statement in needed.values()}
    return [statement for statement in tree.body if id(statement) in kept]


def _defines(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement at the top of the file binds; of imports those of Python's own library alone."""
    match statement:
        case ast.FunctionDef(name=name):
            yield name
        case ast.Assign(targets=targets):
            yield from (it.id for target in targets for it in ast.walk(target) if isinstance(it, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name
        case ast.Import(names=names):
            own = (it for it in names if it.name.partition(".")[0] in sys.stdlib_module_names)
            yield from (it.asname or it.name.partition(".")[0] for it in own)
        case ast.ImportFrom(module=str(module), names=names) if module.partition(".")[0] in sys.stdlib_module_names:
            yield from (it.asname or it.name for it in names)


def _uses(statement: ast.stmt) -> set[str]:
    """The names that it reads from around it; annotations are never evaluated."""
    bare = copy.deepcopy(statement)
    local: set[str] = set()
    for node in ast.walk(bare):
        match node:
            case ast.arg(arg=name):
                node.annotation = None
                local.add(name)
            case ast.FunctionDef():
                node.returns = None
            case ast.ImportFrom(names=names) | ast.Import(names=names):
                local |= {it.asname or it.name.partition(".")[0] for it in names}
            case ast.Name(id=name, ctx=ast.Store()) if isinstance(statement, ast.FunctionDef):
                local.add(name)
            case ast.AnnAssign() if isinstance(statement, ast.FunctionDef):
                node.annotation = ast.Constant(None)
    if isinstance(bare, ast.AnnAssign):
        bare.annotation = ast.Constant(None)
    read = (node.id for node in ast.walk(bare) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
    return set(read) - local


def _signature(tree: ast.Module, wanted: str, file: Path) -> ast.stmt:
    """A function of the same parameters that cannot be called; defaults that are no constants become None."""
    owner, _, name = wanted.rpartition(".")
    body: list[ast.stmt] = tree.body
    if owner:
        body = next((it.body for it in body if isinstance(it, ast.ClassDef) and it.name == owner), [])
    found = next((it for it in body if isinstance(it, _Function) and it.name == name), None)
    if found is None:
        raise EngineError(f"{file} has no {wanted}")
    arguments = copy.deepcopy(found.args)
    arguments.defaults = [_constant(it) for it in arguments.defaults]
    arguments.kw_defaults = [None if it is None else _constant(it) for it in arguments.kw_defaults]
    refusing = ast.parse("raise NotImplementedError").body
    function = ast.FunctionDef(name=name, args=arguments, body=refusing, decorator_list=[])
    return ast.ClassDef(name=owner, bases=[], keywords=[], body=[function], decorator_list=[]) if owner else function


def _constant(default: ast.expr) -> ast.expr:
    return default if isinstance(default, ast.Constant) else ast.Constant(None)
