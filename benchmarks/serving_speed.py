"""How much faster does SGLang serve with the plugin? Prefill and decode of dummy models, stock against plugin, in turn.

usage, from the repository root: python -m benchmarks.serving_speed [--models NAME ...] [--layers 8] [--runs 7]
       [--weights spread|engine] [--eager-decode] [--out FOLDER]

The plugin takes its tables from where a server would (SGLANG_MOE_EXT_STORE): tune the models before, with
`sglang-moe-ext tune --model NAME --install none`. Needs SGLang 0.5.15 and a GPU that holds a model twice.
`--weights engine` are those of the engine's own dummy loader, whose layers add nothing to their input.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks.serving import outputs, speed_report
from benchmarks.serving.cases import CASES, Case, decode_batches, most_tokens
from benchmarks.serving.children import Child, environment, running
from benchmarks.serving.served_model import Plan
from benchmarks.serving.speed_report import Asked, Raced
from benchmarks.serving.turns import take_turns
from benchmarks.vs_upstream.report import here
from sglang_moe_ext.core import EngineError, MoEExtError

FOLDERS = {
    "GLM-4.7-Flash": "glm_4_7_flash",
    "Qwen3-30B-A3B": "qwen3_30b_a3b",
    "Qwen3-30B-A3B-FP8": "qwen3_30b_a3b_fp8",
}
"""What benchmarks/dummy_model.py calls each."""
FEWEST_RUNS = 5
CHILD = "benchmarks.serving.model_child"

Start = Callable[[str, Path], Child]
"""The child of that name, stock or plugin, that logs there."""


def start(name: str, log: Path) -> Child:
    """The real one."""
    return Child(name, running(CHILD), environment(stock=name == "stock"), log)


def raced(model: str, plan: Plan, runs: int, out: Path, start: Start) -> Raced:
    """The model served by both children.

    Raises:
        EngineError: a child fails, is not what its name says, or decodes otherwise than planned.
    """
    children: dict[str, Child] = {}
    try:
        loaded = {}
        for name in ("stock", "plugin"):  # one after the other: each takes its share of the memory that is free then
            children[name] = start(name, out / f"{name}_{model}.log")
            loaded[name] = children[name].ask("load", plan=asdict(plan), limit=None)
            refuse_impostor(name, is_active=loaded[name]["active"], child=children[name])
            if loaded[name]["has_decode_graphs"] != bool(plan.decode_batches):
                raise EngineError(f"the {name} child captured no CUDA graphs of its decode steps; try --eager-decode")
            print(f"{model}: {name} loaded in {loaded[name]['seconds']:.0f} s", file=sys.stderr, flush=True)
        stock, plugin = children["stock"], children["plugin"]
        agreement = outputs.compared(stock, plugin, out)
        times = []
        for case in CASES:
            times.append(take_turns(case, runner(stock), runner(plugin), runs))
            print(speed_report.row(times[-1]), file=sys.stderr, flush=True)
        said = {name: tuple(child.ask("said")["lines"]) for name, child in children.items()}
        return Raced(model, tuple(times), agreement, said, loaded["plugin"]["attached_ms"])
    finally:
        for child in children.values():
            child.close()


def refuse_impostor(name: str, *, is_active: bool, child: Child) -> None:
    """Raises EngineError where stock has our hooks, or the plugin's child has not."""
    if is_active != (name == "plugin"):
        said = " | ".join(child.ask("said")["lines"]) or "nothing"
        state = "active" if is_active else "not active"
        raise EngineError(f"in the {name} child the hooks are {state}; it said {said} (log: {child.log})")


def runner(child: Child) -> Callable[[Case, int], float]:
    """As `take_turns` runs it."""

    def run(case: Case, number: int) -> float:
        return float(child.ask("run", kind=case.kind, size=case.size, seed=number)["ms"])

    return run


def _runs(text: str) -> int:
    number = int(text)
    if number < FEWEST_RUNS:
        raise argparse.ArgumentTypeError(f"{number}: expected {FEWEST_RUNS} or more, for an interval")
    return number


def _layers(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{number}: expected 2 or more, since GLM's first layer is dense")
    return number


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", nargs="+", choices=list(FOLDERS), default=list(FOLDERS), metavar="NAME")
    arguments.add_argument("--layers", type=_layers, default=8)
    arguments.add_argument("--runs", type=_runs, default=7)
    arguments.add_argument("--weights", choices=["spread", "engine"], default="spread")
    arguments.add_argument("--eager-decode", action="store_true", help="decode without CUDA graphs")
    arguments.add_argument("--out", type=Path, help="keep the children's logs and logits there")
    return arguments


def plan_of(asked: argparse.Namespace, folder: Path) -> Plan:
    """What both children load."""
    batches = decode_batches()
    graphs = () if asked.eager_decode else tuple(batches)
    return Plan(str(folder), asked.weights, most_tokens(asked.runs), graphs, max(batches))


def main() -> None:
    asked = parser().parse_args()
    place = here(shlex.join(["python", "-m", "benchmarks.serving_speed", *sys.argv[1:]]))
    from benchmarks import dummy_model

    with tempfile.TemporaryDirectory() as scratch:
        out = asked.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        meaning = Asked(asked.layers, asked.runs, asked.weights, decode_graphs=not asked.eager_decode)
        print(speed_report.header(place, meaning), flush=True)
        every: list[Raced] = []
        for model in asked.models:
            folder = Path(scratch) / model
            dummy_model.write(folder, FOLDERS[model], asked.layers)
            every.append(raced(model, plan_of(asked, folder), asked.runs, out, start))
            print(f"\n{speed_report.table(every[-1])}", flush=True)
            document = json.dumps(speed_report.document(place, meaning, every))
            (out / "serving_speed.json").write_text(document, encoding="utf-8")
        print(document)


if __name__ == "__main__":
    try:
        main()
    except MoEExtError as error:
        sys.exit(f"error: {error}")
