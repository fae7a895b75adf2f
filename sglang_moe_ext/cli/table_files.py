"""What `check` and `import` share: files of tables on the command line, and what is found wrong with them."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_moe_ext.cli import console, engine_choice, layer_args, layer_flags
from sglang_moe_ext.core import Gpu, MoEShape, Projection
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.stock import fit, given_table
from sglang_moe_ext.stock.fit import EntryProblem
from sglang_moe_ext.stock.given_table import FittingLayer, GivenTable
from sglang_moe_ext.tables import config_table
from sglang_moe_ext.tuning.problem import Problem


@dataclass(frozen=True, slots=True)
class CheckedFile:
    """One file: what it is for, and what is wrong with its entries on that GPU."""

    given: GivenTable
    engine: EngineName
    gpu: Gpu
    layer: FittingLayer
    is_compiled: bool
    problems: tuple[EntryProblem, ...]


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which files, for which layer, on which GPU."""
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="table of SGLang or vLLM to read")
    engine_choice.add_to(parser)
    parser.add_argument("--model", help="model that the tables are for, where several ask for tables of that name")
    parser.add_argument("--shape", help="numbers of the layer that the tables are for: E=..,N=..,K=..,topk=..")
    parser.add_argument("--tp-size", "--tp", type=int, help="tensor-parallel size of the server (default 1)")
    parser.add_argument("--ep-size", "--ep", type=int, help="expert-parallel size of the server (default 1)")
    parser.add_argument(
        "--no-compile", action="store_true", help="check by the rules alone, without the Triton compiler"
    )


def check(arguments: argparse.Namespace, gpu_name: str | None) -> list[CheckedFile]:
    """Check each file, for the GPU of that name or the one in its own name.

    Raises:
        MoEExtError: a file is no table, or its layer or GPU cannot be told.
    """
    given = [given_table.read(path) for path in dict.fromkeys(arguments.files) if config_table.is_table(path.name)]
    with console.Bar() as bar:
        return [_check(arguments, one, gpu_name, bar) for one in given]


def _check(arguments: argparse.Namespace, given: GivenTable, gpu_name: str | None, bar: console.Bar) -> CheckedFile:
    engine = arguments.engine or given.engine or engine_choice.choose(None)
    gpu = given.gpu if gpu_name is None else find_gpu(gpu_name)
    layer = given_table.layer_of(given, engine, _stated(arguments, engine))
    projection: Projection = "down" if given.key.down else "up"
    problem = Problem(layer.shape, gpu, engine)
    problems = fit.check_by_rule(given.table, problem, projection)
    compiles = not arguments.no_compile and importlib.util.find_spec("triton") is not None
    if compiles:
        broken = {one.tokens for one in problems}
        rest = {m: config for m, config in given.table.items() if m not in broken}
        stage = f"compiling {given.path.name}"
        problems += fit.check_by_compiler(rest, problem, projection, lambda done, of: bar(stage, done, of))
    return CheckedFile(given, engine, gpu, layer, compiles, tuple(sorted(problems, key=lambda it: it.tokens)))


def _stated(arguments: argparse.Namespace, engine: EngineName) -> MoEShape | None:
    if not arguments.model and not arguments.shape:
        return None
    parser = argparse.ArgumentParser()
    layer_flags.add_to(parser)
    layer_flags.add_engine_to(parser)
    stated = {**vars(parser.parse_args([])), **vars(arguments), "engine": engine}
    return layer_args.parse_layer(argparse.Namespace(**stated)).shape


def show(checked: Sequence[CheckedFile]) -> None:
    """Print what was found."""
    for one in checked:
        models = f", of {', '.join(one.layer.models)}" if one.layer.models else ""
        by = "by the rules and the compiler" if one.is_compiled else "by the rules alone"
        print(f"{one.given.path}: a table of {ENGINES[one.engine].TITLE} for {one.layer.shape}{models}")
        if one.problems:
            for problem in one.problems:
                print(f"  entry {problem.tokens}, {problem.config}: {problem.why}")
        else:
            print(f"  all {len(one.given.table)} entries fit {one.gpu.device_name}, {by}")


def entry(one: CheckedFile) -> Mapping[str, Any]:
    """The same for programs."""
    return {
        "file": str(one.given.path),
        "engine": one.engine,
        "gpu": one.gpu.device_name,
        "triton": one.given.triton,
        "shape": str(one.layer.shape),
        "models": list(one.layer.models),
        "compiled": one.is_compiled,
        "fits": not one.problems,
        "problems": [{"M": it.tokens, "config": str(it.config), "why": it.why} for it in one.problems],
    }
