"""Read from an SGLang's sources what our ways into it rely on, and what differs from release to release."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext.engines.sglang import source_patch
from sglang_moe_ext.engines.sglang.installation import SglangInstallation

CALLS = "load_plugins"
BESIDE_SERVERS = ("bench_one_batch.py", "benchmark/one_batch.py", "srt/ray/scheduler_actor.py")
"""Files that build an engine of their own, in processes that no server starts."""


class UnreadableError(Exception):
    """The sources are not written as the reader of a fact expects: nobody knows then, and no table may say no."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one release. `calls`: file and function of each call of the entry points; `uncalled`: files without one."""

    release: str
    has_plugins: bool
    calls: tuple[str, ...]
    uncalled: tuple[str, ...]
    layer_package: str
    kernel_module: str
    knows_up_tma: bool
    asserts_one_block_m: bool
    reuses_up_table: bool
    lookup_takes_per_channel: bool
    tritons_are_listed: bool
    returns_routed_experts: bool


def function_of(module: ast.Module, name: str) -> ast.FunctionDef:
    """Raises UnreadableError where the module has no such function."""
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise UnreadableError(f"no function {name}")


def knows_up_tma(layer: ast.Module) -> bool:
    """Whether the layer takes USE_TMA out of the up projection's configuration, `config`, before the kernel sees it."""
    popped = {
        node.func.value.id
        for node in ast.walk(layer)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "pop"
        and isinstance(node.func.value, ast.Name)
        and any(isinstance(argument, ast.Constant) and argument.value == "USE_TMA" for argument in node.args)
    }
    if "down_config" not in popped:
        raise UnreadableError("nothing takes USE_TMA out of down_config")
    return "config" in popped


def asserts_one_block_m(config: ast.Module) -> bool:
    """Whether another BLOCK_SIZE_M in the down table raises; else the up table's must replace it."""
    lookup = function_of(config, "try_get_optimal_moe_config")
    if any(isinstance(node, ast.Assert) and "BLOCK_SIZE_M" in ast.unparse(node.test) for node in ast.walk(lookup)):
        return True
    replaced = "down_config['BLOCK_SIZE_M'] = config['BLOCK_SIZE_M']"
    if not any(isinstance(node, ast.Assign) and ast.unparse(node) == replaced for node in ast.walk(lookup)):
        raise UnreadableError("BLOCK_SIZE_M of the two tables is neither asserted nor replaced")
    return False


def reuses_up_table(config: ast.Module) -> bool:
    """Whether the search for a down table that is missing asks again for the up table."""
    search = function_of(config, "get_moe_configs")
    return any(isinstance(node, ast.Call) and ast.unparse(node.func) == search.name for node in ast.walk(search))


def tritons_are_listed(config: ast.Module) -> bool:
    """Whether tables of other Tritons are found by a list in the source; else by the folders that are there."""
    search = ast.unparse(function_of(config, "get_moe_configs"))
    if ("supported_triton_versions" in search) == ("os.listdir" in search):
        raise UnreadableError("neither a list of Tritons nor a listing of folders")
    return "supported_triton_versions" in search


def lookup_takes_per_channel(config: ast.Module) -> bool:
    """Whether a per-channel layer can ask for its own table."""
    lookup = function_of(config, "try_get_optimal_moe_config")
    return "per_channel_quant" in {argument.arg for argument in lookup.args.args}


def returns_routed_experts(server_args: Iterable[ast.Module]) -> bool:
    """Whether the server has --enable-return-routed-experts, a field of its arguments."""
    fields = {
        node.target.id
        for module in server_args
        for parent in module.body
        if isinstance(parent, ast.ClassDef)
        for node in parent.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    if "model_path" not in fields:
        raise UnreadableError("the server's arguments are not fields of classes")
    return "enable_return_routed_experts" in fields


def calls_in(module: ast.Module) -> Iterator[str]:
    """The functions that call the engine's own `load_plugins`; `the module` outside of any."""
    imports = (node for node in ast.walk(module) if isinstance(node, ast.ImportFrom))
    if not any(node.module == source_patch.GROUP and CALLS in {name.name for name in node.names} for node in imports):
        return
    yield from _calls(module.body, "")


def _calls(body: Iterable[ast.AST], inside: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _calls(node.body, f"{inside}.{node.name}".lstrip("."))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == CALLS:
            yield inside or "the module"
        else:
            yield from _calls(ast.iter_child_nodes(node), inside)


def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_bytes())


def _call_sites(root: Path) -> Iterator[str]:
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if "test" in relative.parts or CALLS.encode() not in (text := file.read_bytes()):
            continue
        yield from (f"{relative}: {function}" for function in calls_in(ast.parse(text)))


def read(engine: SglangInstallation) -> Facts:
    """What that release's sources say.

    Raises:
        UnreadableError: they are not written as expected.
    """
    folder = engine.configs_root.parent
    config, layer = _parsed(folder / "fused_moe_triton_config.py"), _parsed(folder / "fused_moe.py")
    # Since 0.5.20 most of the server's arguments lie in modules of their own.
    arguments = [engine.root / "srt/server_args.py", *sorted(engine.root.glob("srt/arg_groups/**/*.py"))]
    calls = tuple(_call_sites(engine.root))
    here = [file for file in BESIDE_SERVERS if (engine.root / file).is_file()]
    return Facts(
        release=engine.version_text,
        has_plugins=source_patch.calls_plugins(engine),
        calls=calls,
        uncalled=tuple(file for file in here if not any(call.startswith(f"{file}: ") for call in calls)),
        layer_package=engine.layer_module.rpartition(".")[0],
        kernel_module=engine.kernel_module,
        knows_up_tma=knows_up_tma(layer),
        asserts_one_block_m=asserts_one_block_m(config),
        reuses_up_table=reuses_up_table(config),
        lookup_takes_per_channel=lookup_takes_per_channel(config),
        tritons_are_listed=tritons_are_listed(config),
        returns_routed_experts=returns_routed_experts(_parsed(file) for file in arguments),
    )
