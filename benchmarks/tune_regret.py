"""How much slower is what a full search chooses than what an exhaustive one does? Both run here, then race.

usage, from the repository root: python -m benchmarks.tune_regret [--layers NAME ...] [--effort full]
       [--batch-size M ...] [--out FOLDER]

Installs nothing. Prints a table in markdown for each layer: today's choice of the engine, that of the full search and
that of the exhaustive one, raced again with other data; and how long each search took, command to end.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.racing import Outcome, geomean, here, raced, track_of
from sglang_moe_ext import env
from sglang_moe_ext.cli import tune
from sglang_moe_ext.cli.console import Bar
from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.engines.sglang import installation
from sglang_moe_ext.gpu.roofline import pair_floor_us
from sglang_moe_ext.tuning import pipeline
from sglang_moe_ext.tuning.bench.messages import Pair
from sglang_moe_ext.tuning.request import TuneRequest
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice

LAYERS = {
    "GLM-4.7-Flash bf16": ["--model", "GLM-4.7-Flash"],
    "Qwen3-30B-A3B fp8 block": ["--model", "Qwen3-30B-A3B-FP8"],
    "DeepSeek-V3 TP8 fp8 block": ["--model", "DeepSeek-V3", "--tp-size", "8"],
}


def searched(
    flags: list[str], effort: str, tokens: list[str], seed: int
) -> tuple[TuneRequest, dict[int, MeasuredChoice[Pair]], float]:
    """The request, what was chosen for each M, and the seconds that it took."""
    given = [*flags, "--effort", effort, "--install", "none", "--kernels", "engine", "--seed", str(seed)]
    if tokens:
        given += ["--batch-size", *tokens]
    begun = time.monotonic()
    request = tune.request_of(tune.parser().parse_args(given), shlex.join(["benchmarks.tune_regret", *given]))
    with Bar() as bar:
        outcome = pipeline.run(request, bar)
    found = {m: result for m, result in outcome.results.items() if isinstance(result, MeasuredChoice)}
    return request, found, time.monotonic() - begun


def compared(name: str, effort: str, tokens: list[str]) -> dict[str, object]:
    """Search twice, race, print; what a program wants to know of it."""
    _, less, less_s = searched(LAYERS[name], effort, tokens, seed=0)
    request, all_of_it, all_s = searched(LAYERS[name], "exhaustive", tokens, seed=1)
    choices: dict[str, dict[int, Pair]] = {
        "today": {m: result.incumbent for m, result in less.items()},
        effort: {m: result.pair for m, result in less.items()},
        "exhaustive": {m: result.pair for m, result in all_of_it.items()},
    }
    outcomes = raced(track_of(request), choices)
    print(f"\n## {name}\n\n`{request.shape}`: {effort} {less_s:.0f} s, exhaustive {all_s:.0f} s, command to end\n")
    columns = ("M", "today us", f"{effort} us", "exhaustive us", f"gain of {effort}", "regret", "95 %", "of floor")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for m, outcome in outcomes.items():
        print(row(request, m, outcome, tuple(choices)))
    mean_gain, mean_regret = (geomean(outcomes, *pair) for pair in (("today", effort), (effort, "exhaustive")))
    print(f"\nGeometric means: {effort} gains {mean_gain:.3f}x, its regret is {mean_regret - 1:+.2%}.", flush=True)
    return {
        "layer": name,
        "seconds": {effort: round(less_s, 1), "exhaustive": round(all_s, 1)},
        "gain": round(mean_gain, 4),
        "regret": round(mean_regret - 1, 5),
        "us": {
            m: [[round(us, 2) for us in outcome.samples(choice) or ()] for choice in choices]
            for m, outcome in outcomes.items()
        },
        "error": {m: [runner.error for runner in outcome.by_name.values()] for m, outcome in outcomes.items()},
    }


def row(request: TuneRequest, tokens: int, outcome: Outcome, names: tuple[str, ...]) -> str:
    """A line of the table: today, the search, the exhaustive one."""
    today, ours, best = names
    won, lost, us = outcome.gain(today, ours), outcome.gain(ours, best), outcome.us(ours)
    cells = (
        str(tokens),
        *("fails" if (typical := outcome.us(name)) is None else f"{typical:.1f}" for name in names),
        "-" if won is None else f"{won.value:.2f}x",
        "-" if lost is None else f"{lost.value - 1:+.1%}",
        "-" if lost is None else f"{lost.low - 1:+.1%} to {lost.high - 1:+.1%}",
        "-" if us is None else f"{pair_floor_us(request.shape, request.gpu, tokens) / us:.0%}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS), metavar="NAME")
    parser.add_argument("--effort", default="full", choices=["quick", "full"])
    parser.add_argument("--batch-size", nargs="+", default=[], metavar="M")
    parser.add_argument("--out", type=Path, help="write all times there, a JSON file a layer, and the runs' journals")
    asked = parser.parse_args()
    gpu, engine = here()
    today = datetime.datetime.now(datetime.timezone.utc).date()
    kernel = f"SGLang {engine.version_text}, Triton {installation.running_triton()}"
    command = shlex.join(["python", "-m", "benchmarks.tune_regret", *sys.argv[1:]])
    print(f"`{command}`, {today}, {gpu.device_name}, {kernel}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        out = asked.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        os.environ[env.STORE] = str(out / "store")
        for name in asked.layers:
            document = compared(name, asked.effort, asked.batch_size)
            (out / f"regret_{name.replace(' ', '_').lower()}.json").write_text(json.dumps(document))


if __name__ == "__main__":
    try:
        main()
    except MoEExtError as error:
        sys.exit(f"error: {error}")
