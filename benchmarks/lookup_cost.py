"""What does a lookup cost with our hooks, what without, and what do they add to the start of a server?

usage, from the repository root: python -m benchmarks.lookup_cost [--device-name NVIDIA_H200] [--out FOLDER]

Asks the engine that Python finds first, each side in a process of its own; runs without a GPU too, for example with
PYTHONPATH=.engines/sglang/0.5.15. The plugin's tables come from where a server's would (SGLANG_MOE_EXT_STORE).
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.serving.attached import engine_here
from benchmarks.serving.children import Child, environment, running
from benchmarks.serving_speed import refuse_impostor
from sglang_moe_ext.core import MoEExtError

CHILD = "benchmarks.serving.lookup_child"
NAMES = ("stock", "plugin")


def timed(name: str, device_name: str, out: Path) -> dict[str, Any]:
    """What the child of that name answers.

    Raises:
        EngineError: it fails, or is not what its name says.
    """
    child = Child(name, running(CHILD), environment(stock=name == "stock"), out / f"{name}_lookup.log")
    try:
        loaded = child.ask("load", pretend=device_name, hooks=name == "plugin")
        refuse_impostor(name, is_active=loaded["active"], child=child)
        return {**child.ask("time"), **loaded, "said": child.ask("said")["lines"]}
    finally:
        child.close()


def table(answers: dict[str, dict[str, Any]]) -> str:
    """A line for each layer and call."""
    lines = ["| layer | call returns | stock us | plugin us |", "|---|---|---:|---:|"]
    for layer, stock in answers["stock"]["us"].items():
        for call, us in stock.items():
            lines.append(f"| {layer} | {call} | {us:.2f} | {answers['plugin']['us'][layer][call]:.2f} |")
    ms = answers["plugin"]["attached_ms"]
    lines += ["", "Attaching took " + ("a time that nobody measured." if ms is None else f"{ms:.1f} ms.")]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--device-name", default="NVIDIA_H200", help="what the engine believes where there is no GPU"
    )
    arguments.add_argument("--out", type=Path, help="keep the children's logs there")
    return arguments


def main() -> None:
    asked = parser().parse_args()
    engine = engine_here()
    place: dict[str, Any] = {
        "engine": f"sglang {engine.version_text}",
        "triton": engine.triton,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.lookup_cost", *sys.argv[1:]]),
    }
    with tempfile.TemporaryDirectory() as scratch:
        out = asked.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        answers = {name: timed(name, asked.device_name, out) for name in NAMES}
    place["device"] = answers["plugin"]["device"]
    print("{device}, {engine}, Triton {triton}, Python {python}, {date}: `{command}`".format(**place))
    print("\nMicroseconds of a call once warm, the best of several; of the first, once.\n")
    print(table(answers))
    for name, answer in answers.items():
        print(f"\nSaid by {name}:\n" + "\n".join(f"- {line}" for line in answer["said"] or ("nothing",)))
    print(json.dumps({**place, **answers}))


if __name__ == "__main__":
    try:
        main()
    except MoEExtError as error:
        sys.exit(f"error: {error}")
