"""`sglang-moe-ext plan`: what `tune` would do for a layer, and whether that is worth its time."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_moe_ext.cli import (
    console,
    differing_layers,
    engine_choice,
    gpu_args,
    layer_flags,
    measure_args,
    output,
    plan_report,
    tune,
)
from sglang_moe_ext.cli.command import Command
from sglang_moe_ext.core import ModelError
from sglang_moe_ext.tables import files
from sglang_moe_ext.tuning import pipeline, weigh
from sglang_moe_ext.tuning.request import TuneRequest
from sglang_moe_ext.tuning.worth import DECODE_CONTEXT

FILE = "plan.json"
_NOT_OFFERED = {
    "budget": None,
    "deadline": None,
    "cmp_configs": (),
    "configs": None,
    "dry_run": False,
    "force": False,
    "install": "none",
    "resume": False,
    "use_deep_gemm": False,
}
"""Flags of `tune` that say nothing of a plan."""


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    layer_flags.add_to(parser)
    layer_flags.add_engine_to(parser)
    parser.set_defaults(engine=None, **_NOT_OFFERED)
    what = parser.add_argument_group("what to print")
    what.add_argument(
        "--worth-it",
        action="store_true",
        help="how much tuning and our own kernels could win, of the layer and of a forward pass; where the GPU is here "
        "the model's best candidates are timed for about ten seconds",
    )
    what.add_argument(
        "--context",
        type=int,
        default=DECODE_CONTEXT,
        metavar="TOKENS",
        help=f"with --worth-it: tokens of each sequence in a step of decode (default {DECODE_CONTEXT})",
    )
    what.add_argument("--predict", action="store_true", help="plan for a run that predicts, even where the GPU is here")
    what.add_argument(
        "--ask",
        action="store_true",
        help="start the engine and ask it, also where its lookup can be run from its files",
    )
    what.add_argument("-v", "--verbose", action="store_true", help="print more of what happens on the way")
    what.add_argument("--output-dir", type=Path, metavar="FOLDER", help=f"write the JSON document there too, as {FILE}")
    measure_args.add_how_to(parser)


def run(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Print the plan, and give its document.

    Raises:
        MoEExtError: any of this package's errors.
    """
    if not 1 <= arguments.context <= gpu_args.MOST_TOKENS:
        raise ModelError(f"--context {arguments.context}: expected a number from 1 to {gpu_args.MOST_TOKENS}")
    if not arguments.from_log and (said := engine_choice.describe_choice(arguments.engine)):
        print(said)
    document = differing_layers.run(arguments, _run_layer)
    if arguments.output_dir is not None:
        path = arguments.output_dir / FILE
        files.write_together({path: json.dumps(document, indent=1) + "\n"})
        print(f"wrote {path}")
    return document


def _run_layer(arguments: argparse.Namespace) -> Mapping[str, Any]:
    request = tune.request_of(arguments, arguments.command_line)
    if note := request.adapter.why_no_table(request.shape, request.gpu, request.architecture):
        print(f"note: {note}")
    return _weigh(request, arguments) if arguments.worth_it else _plan(request, arguments)


def _plan(request: TuneRequest, arguments: argparse.Namespace) -> Mapping[str, Any]:
    with console.Bar() as bar:
        plan = pipeline.make_plan(request, bar, ask=arguments.ask)
    plan_report.say_plan(request, plan)
    return output.plan_document(request, plan)


def _weigh(request: TuneRequest, arguments: argparse.Namespace) -> Mapping[str, Any]:
    with console.Bar() as bar:
        weighed = weigh.weigh(request, bar, ask=arguments.ask, context=arguments.context)
    plan_report.say_worth(request, weighed.plan, weighed.worth)
    return {**output.plan_document(request, weighed.plan), "worth": plan_report.worth_document(weighed.worth)}


COMMAND = Command(
    name="plan",
    summary="show what tuning a model would do, and how much it could win",
    description=(
        "Show what `tune` would do for a layer: batch sizes, candidates after pruning, a forecast, the time it takes.\n"
        "With --worth-it, estimate before tuning what tuning and our own kernels could win, of the layer and of a\n"
        "whole forward pass, with a plain sentence at the end. Nothing is written into an engine."
    ),
    examples=(
        ("sglang-moe-ext plan --model GLM-4.7-Flash --tp-size 4 --gpu H200", "print the plan and the possible gain"),
        (
            "sglang-moe-ext plan --model Qwen/Qwen3-30B-A3B-FP8 --gpu H100 --worth-it",
            "is tuning worth its time for this model on that GPU?",
        ),
    ),
    add_to=add_to,
    run=run,
    succeeded=differing_layers.succeeded,
)
