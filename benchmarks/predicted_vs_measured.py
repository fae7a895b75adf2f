"""Race, on this machine's GPU, three tables of one layer: the engine's choice today, ours predicted, ours measured.

usage, from the repository root: python -m benchmarks.predicted_vs_measured [MODEL] [M ...]

Installs nothing; prints a table in markdown.
"""

from __future__ import annotations

import argparse
import sys
import time

from benchmarks.racing import Outcome, geomean, here, raced, track_of
from sglang_moe_ext.cli import tune
from sglang_moe_ext.cli.console import Bar
from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.engines.registry import SGLANG
from sglang_moe_ext.gpu.roofline import pair_floor_us
from sglang_moe_ext.tuning import pipeline, tune_plan
from sglang_moe_ext.tuning.bench.messages import Pair
from sglang_moe_ext.tuning.compile.cache import CompileCache
from sglang_moe_ext.tuning.compile.kernel_source import kernel_source
from sglang_moe_ext.tuning.compile.pool import compile_all
from sglang_moe_ext.tuning.request import TuneRequest
from sglang_moe_ext.tuning.search import predict
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice

COLUMNS = (
    "M",
    "today us",
    "predicted us",
    "measured us",
    "gain",
    "predicted loses",
    "of floor",
    "predicted",
    "measured",
)


def predicted(request: TuneRequest) -> dict[int, Pair]:
    """What a table without a GPU has for each M."""
    source = kernel_source(SGLANG.find(), SGLANG)
    table = predict.predict_table(
        tune_plan.prune_space(request.problem).kept,
        request.problem,
        request.tokens,
        lambda jobs: compile_all(source, jobs, cache=CompileCache(None)),
    )
    return {m: {"up": choice.config, "down": choice.config} for m, choice in table.items()}


def row(request: TuneRequest, tokens: int, outcome: Outcome) -> str:
    """A line of the table."""
    us = {name: outcome.us(name) for name in outcome.by_name}
    gain, loss = outcome.gain("today", "measured"), outcome.gain("predicted", "measured")
    floor = pair_floor_us(request.shape, request.gpu, tokens)
    best = us["measured"]
    guess, found = (outcome.by_name[name].pair for name in ("predicted", "measured"))
    cells = (
        str(tokens),
        *("fails" if of is None else f"{of:.1f}" for of in us.values()),
        "-" if gain is None else f"{gain.value:.2f}x",
        "-" if loss is None else f"{loss.value - 1:+.1%}",
        "-" if best is None else f"{floor / best:.0%}",
        str(guess["up"]),
        f"{found['up']} / {found['down']}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="GLM-4.7-Flash")
    parser.add_argument("tokens", nargs="*", metavar="M")
    asked = parser.parse_args()
    here()
    flags = ["--model", asked.model, "--install", "none"]
    if asked.tokens:
        flags += ["--batch-size", *asked.tokens]
    request = tune.request_of(tune.parser().parse_args(flags), "benchmarks.predicted_vs_measured")
    track = track_of(request)
    begun = time.monotonic()
    with Bar() as bar:
        run = pipeline.run(request, bar)
    took_s = time.monotonic() - begun
    measured = {m: result for m, result in run.results.items() if isinstance(result, MeasuredChoice)}
    guesses = predicted(request)
    choices: dict[str, dict[int, Pair]] = {
        "today": {m: result.incumbent for m, result in measured.items()},
        "predicted": {m: guesses[m] for m in measured},
        "measured": {m: result.pair for m, result in measured.items()},
    }
    outcomes = raced(track, choices)
    print(
        f"{request.model} {request.shape} on {request.gpu.device_name}, {run.kernel.name}; measured in {took_s:.0f} s"
    )
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for m, outcome in outcomes.items():
        print(row(request, m, outcome))
    gain, regret = geomean(outcomes, "today", "measured"), geomean(outcomes, "predicted", "measured")
    print(f"geometric means: gain {gain:.3f}x, the predicted table is slower than the measured by {regret - 1:.1%}")


if __name__ == "__main__":
    try:
        main()
    except MoEExtError as error:
        sys.exit(f"error: {error}")
