"""`python -m sglang_moe_ext.tune`: tune a layer for a GPU, install the tables, prove the pick-up."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Sequence

from sglang_moe_ext.cli import console, layer_args, measure_args, output
from sglang_moe_ext.core import Gpu, MoEExtError
from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.tuning import compare_configs, config_args, install_target, pipeline
from sglang_moe_ext.tuning.plan import DEFAULT_TOKENS, TunePlan
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.request import MeasureOptions, TuneRequest

_EXAMPLES = """examples:
  python -m sglang_moe_ext.tune --model GLM-4.7-Flash                       measure on the GPU of this machine
  python -m sglang_moe_ext.tune --model GLM-4.7-Flash --gpu RTX_4090        predict for a GPU that is not here
  python -m sglang_moe_ext.tune --model /models/mine --tp 4 --dry-run       only say what would be done
  python -m sglang_moe_ext.tune --model GLM-4.7-Flash --configs 64 128 64 16 4 3   only time that one beside today's
  python -m sglang_moe_ext.tune --engine vllm --model Qwen3-30B-A3B -tp 2 --save-dir tables
  python -m sglang_moe_ext.tune --from-log "... Config file not found at .../E=65,N=1536,device_name=...json"
"""


def parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    flags = argparse.ArgumentParser(
        prog="python -m sglang_moe_ext.tune",
        description="Find the best configurations of the fused-MoE kernel, install them, prove the pick-up.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    layer_args.add_to(flags)
    layer_args.add_engine_to(flags)
    how = flags.add_argument_group("how")
    how.add_argument("--predict", action="store_true", help="do not measure, even where the GPU is here")
    how.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    how.add_argument("-v", "--verbose", action="store_true", help="say why each candidate is left out")
    measure_args.add_to(flags)
    install_target.add_to(flags)
    return flags


def request_of(arguments: argparse.Namespace, command: str) -> TuneRequest:
    """What the flags ask for.

    Raises:
        MoEExtError: they make no sense together, or name nothing known.
    """
    measure_args.check(arguments)
    layer = layer_args.parse_layer(arguments)
    if measure_args.is_comparison(arguments) and arguments.ray is None and specs.detect() is None:
        measure_args.refuse_without_measuring(arguments, "this machine has no GPU: run it where the GPU is")
    gpu, is_here = layer_args.gpu_of(arguments, layer)
    adapter = ENGINES[arguments.engine]
    engine = adapter.find()
    if engine is not None and (why := adapter.why_not_tuned(layer.shape.quantization, engine.version)):
        raise MoEExtError(f"{adapter.TITLE} {engine.version_text} takes no table for {layer.shape.quantization}: {why}")
    measures = not arguments.predict and (is_here or arguments.ray is not None) and engine is not None
    if not measures:
        measure_args.refuse_without_measuring(arguments, _why_not_measured(adapter.TITLE, gpu, is_here))
    return TuneRequest(
        model=layer.name,
        architecture=layer.architecture,
        problem=Problem(layer.shape, gpu, arguments.engine),
        vllm_shape=layer.vllm_shape,
        gpu_is_here=is_here,
        tokens=layer_args.tokens_of(arguments, DEFAULT_TOKENS),
        measuring=measure_args.measure_options(arguments, layer.shape, gpu, engine) if measures and engine else None,
        install=arguments.install,
        output_dir=arguments.output_dir,
        seed=arguments.seed,
        command=command,
    )


def _why_not_measured(engine: str, gpu: Gpu, is_here: bool) -> str:
    if not is_here:
        return f"{gpu.device_name} is not here: run it where that GPU is, or leave it out to predict"
    return (
        f"{engine}, whose own kernel is to be measured, is not installed here: install it, or leave it out to predict"
    )


def _say_plan(request: TuneRequest, plan: TunePlan) -> None:
    gpu = request.gpu
    where = "here" if request.gpu_is_here else "not here"
    print(f"{request.model}: {request.shape}")
    print(f"{gpu.device_name} ({where}): sm_{gpu.sm}, {gpu.smem_per_block} B of shared memory a block, {gpu.source}")
    for engine, name in output.names_of(request).items():
        print(f"  {engine}: {name}")
    console.show(output.candidates(plan))
    console.show(output.forecast(plan))
    doing = "measure" if plan.measures else "predict"
    print(f"will {doing} {len(plan.rows)} batch sizes with {plan.binaries} binaries, in about {plan.estimated_s:.0f} s")


def _say_outcome(request: TuneRequest, outcome: pipeline.TuneOutcome) -> None:
    engine = request.adapter.TITLE
    console.show(output.results(request, outcome))
    if not outcome.kernel.is_engines_own:
        print(f"no {engine} is installed here: compiled from this package's own kernel, which has the same tiles")
    if output.origin(outcome) == "predicted":
        print("PREDICTED: compiled for this GPU, fits and does not spill; ranked by a model, not timed")
    left_out = [str(m) for m in request.tokens if m not in outcome.results]
    if left_out:
        print(f"left out: M={', '.join(left_out)}: nothing that ran there was right, as said above")
    for path in outcome.written:
        print(f"wrote {path}")
    for path, why in outcome.refused.items():
        print(f"kept  {path}: {why}")
    if outcome.destination is None:
        why = "as --install none asks" if request.install == "none" else f"since {engine} is not installed here"
        print(f"kept in your own store alone, {why}; run this again where {engine} is, or with --output-dir")
    elif outcome.destination.note:
        print(outcome.destination.note)
    if outcome.answer is not None:
        pretence = "" if request.gpu_is_here else ", told that it runs on this GPU"
        asked = f"{engine} {outcome.answer.engine_version} with Triton {outcome.answer.triton}"
        print(f"picked up: {asked}, asked in a fresh process{pretence}, says:")
        for line in outcome.answer.log:
            print(f"  {line}")


def _compare(arguments: argparse.Namespace, request: TuneRequest, measuring: MeasureOptions) -> None:
    given = config_args.parse_choices(arguments.configs, arguments.cmp_configs, request.tokens)
    if not request.adapter.HAS_DOWN_TABLES:
        config_args.refuse_two_configs(given, request.adapter.TITLE)
    with console.Bar() as bar:
        found = compare_configs.run(request, measuring, given, bar)
    console.show(output.comparison(request, found))
    print("nothing was written")
    print(json.dumps(output.comparison_document(request, found)))


def run(arguments: argparse.Namespace, command: str) -> None:
    """Do what the flags say; the last line printed is JSON.

    Raises:
        MoEExtError: any of ours.
    """
    request = request_of(arguments, command)
    adapter = request.adapter
    if request.gpu_is_here and not arguments.predict and adapter.find() is None:
        print(f"{adapter.TITLE} is not installed here, and only its own kernel is worth measuring: predicting instead")
    note = adapter.why_no_table(request.shape, request.gpu, request.architecture)
    if note:
        print(f"note: {note}")
    if measure_args.is_comparison(arguments) and request.measuring is not None:
        _compare(arguments, request, request.measuring)
    elif arguments.dry_run:
        with console.Bar() as bar:
            plan = pipeline.make_plan(request, bar)
        _say_plan(request, plan)
        print(json.dumps(output.plan_document(request, plan)))
    else:
        with console.Bar() as bar:
            outcome = pipeline.run(request, bar)
        _say_outcome(request, outcome)
        print(json.dumps(output.document(request, outcome)))


def _of_interrupt(arguments: argparse.Namespace) -> str:
    if measure_args.is_comparison(arguments):
        return "stopped; nothing was written"
    return "stopped; tables are written whole or not at all, and last; a measuring run goes on from here with --resume"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 an error of ours in one line, 2 usage."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(given)
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(message)s")
    try:
        run(arguments, shlex.join(["python", "-m", "sglang_moe_ext.tune", *given]))
    except MoEExtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(_of_interrupt(arguments), file=sys.stderr)
        return 1
    return 0
