"""`sglang-moe-ext tune`: tune a layer for a GPU, install the tables, prove that the engine reads them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from sglang_moe_ext import env
from sglang_moe_ext.cli import (
    console,
    differing_layers,
    engine_choice,
    gpu_args,
    layer_args,
    layer_flags,
    measure_args,
    output,
    plan_report,
    tune_for_server,
    tune_grouped_gemm,
)
from sglang_moe_ext.cli.command import Command, configure
from sglang_moe_ext.core import Gpu, MoEExtError, StoreError
from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.tables import files, user_store
from sglang_moe_ext.tuning import compare_configs, config_args, install_target, pipeline
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.request import MeasureOptions, TuneRequest
from sglang_moe_ext.tuning.tune_plan import DEFAULT_TOKENS

UNTRIED_ON_AMD = (
    "measuring on an AMD GPU is written and has never been run: nobody who made this package has one; please report "
    "what it does, and --predict needs no GPU"
)


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    layer_flags.add_to(parser)
    layer_flags.add_engine_to(parser)
    parser.set_defaults(engine=None)
    how = parser.add_argument_group("what to do")
    how.add_argument("--predict", action="store_true", help="predict without measuring, even where the GPU is present")
    how.add_argument(
        "--dry-run", action="store_true", help="print what would be done, and what it could gain, and stop"
    )
    how.add_argument(
        "--ask",
        action="store_true",
        help="with --dry-run: start the engine and ask it, also where its lookup can be run from its files alone",
    )
    how.add_argument("-v", "--verbose", action="store_true", help="print why each candidate was left out")
    measure_args.add_to(parser)
    tune_for_server.add_to(parser)
    tune_grouped_gemm.add_to(parser)
    install_target.add_to(parser)


def parser() -> argparse.ArgumentParser:
    """The parser of this command alone."""
    made = argparse.ArgumentParser(prog="sglang-moe-ext tune")
    configure(made, COMMAND)
    return made


def _with_engine(arguments: argparse.Namespace) -> argparse.Namespace:
    """The flags with the engine that they mean; a pasted line tells its engine itself."""
    engine = arguments.engine if arguments.from_log else engine_choice.choose(arguments.engine)
    return argparse.Namespace(**{**vars(arguments), "engine": engine})


def request_of(arguments: argparse.Namespace, command: str) -> TuneRequest:
    """What the flags ask for.

    Raises:
        MoEExtError: they make no sense together, or name nothing known.
    """
    measure_args.check(arguments)
    layer = layer_args.parse_layer(arguments := _with_engine(arguments))
    if measure_args.is_comparison(arguments) and arguments.ray is None and specs.detect() is None:
        measure_args.refuse_without_measuring(arguments, "this machine has no GPU: run it where the GPU is")
    gpu, is_here = gpu_args.gpu_of(arguments, layer)
    gpu_args.print_memory_note(layer, gpu)
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
        tokens=gpu_args.tokens_of(arguments, DEFAULT_TOKENS),
        measuring=measure_args.measure_options(arguments, layer.shape, gpu, engine) if measures and engine else None,
        install=arguments.install,
        output_dir=arguments.output_dir,
        seed=arguments.seed,
        command=command,
        force=arguments.force,
        surroundings=layer.surroundings,
    )


def _why_not_measured(engine: str, gpu: Gpu, is_here: bool) -> str:
    if not is_here:
        return f"{gpu.device_name} is not here: run it where that GPU is, or leave it out to predict"
    return (
        f"{engine}, whose own kernel is to be measured, is not installed here: install it, or leave it out to predict"
    )


def _say_outcome(request: TuneRequest, outcome: pipeline.TuneOutcome) -> None:
    engine = request.adapter.TITLE
    console.show(output.results(request, outcome))
    plan_report.say_today(request, outcome.today)
    if gain := output.gain_line(output.gains(request, outcome), output.origin(outcome)):
        print(gain)
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


def _compare(arguments: argparse.Namespace, request: TuneRequest, measuring: MeasureOptions) -> Mapping[str, Any]:
    given = config_args.parse_choices(arguments.configs, arguments.cmp_configs, request.tokens)
    if not request.adapter.HAS_DOWN_TABLES:
        config_args.refuse_two_configs(given, request.adapter.TITLE)
    with console.Bar() as bar:
        found = compare_configs.run(request, measuring, given, bar)
    console.show(output.comparison(request, found))
    print("nothing was written")
    return output.comparison_document(request, found)


def run(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Do what the flags say, and give the document of what was done.

    Raises:
        MoEExtError: any of this package's errors.
    """
    tune_for_server.begin(arguments)
    if arguments.kernel == "grouped_gemm":
        measure_args.check(arguments)
        arguments.is_measuring = True
        return tune_grouped_gemm.run(arguments)
    tune_grouped_gemm.refuse_elsewhere(arguments)
    if not arguments.from_log and (said := engine_choice.describe_choice(arguments.engine)):
        print(said)
    return differing_layers.run(arguments, _run_layer)


def _run_layer(arguments: argparse.Namespace) -> Mapping[str, Any]:
    request = request_of(arguments, arguments.command_line)
    arguments.is_measuring = request.measuring is not None  # for what an interrupt says
    if needless := tune_for_server.why_needless(arguments, request):
        print(f"nothing to do: {needless}")
        return {"needless": needless}
    adapter = request.adapter
    if request.gpu_is_here and not arguments.predict and adapter.find() is None:
        print(f"{adapter.TITLE} is not installed here, and only its own kernel is worth measuring: predicting instead")
    if request.measuring is not None and request.gpu.target.is_amd:
        print(f"note: {UNTRIED_ON_AMD}")
    note = adapter.why_no_table(request.shape, request.gpu, request.architecture)
    if note:
        print(f"note: {note}")
    if measure_args.is_comparison(arguments) and request.measuring is not None:
        return _compare(arguments, request, request.measuring)
    if arguments.dry_run:
        with console.Bar() as bar:
            plan = pipeline.make_plan(request, bar, ask=arguments.ask)
        plan_report.say_plan(request, plan)
        return output.plan_document(request, plan)
    _check_store()
    with console.Bar() as bar:
        outcome = pipeline.run(request, bar)
    _say_outcome(request, outcome)
    return output.document(request, outcome)


def _check_store() -> None:
    """Raises StoreError, before any work, where the user's own store cannot be written."""
    store = user_store.root()
    if not files.is_writable(store):
        raise StoreError(f"cannot write your own store {store}: name a folder that can be written with {env.STORE}")


def _stopped(arguments: argparse.Namespace) -> str:
    if measure_args.is_comparison(arguments):
        return "stopped; nothing was written"
    resume = "; --resume continues this run" if getattr(arguments, "is_measuring", False) else ""
    return f"stopped; tables are written last, and whole or not at all{resume}"


COMMAND = Command(
    name="tune",
    summary="find the fastest kernel configurations for a model on a GPU, and install them",
    description=(
        "Find the fastest configurations of the fused-MoE kernel of SGLang or vLLM for one model on one GPU, write\n"
        "them where the engine reads them, and prove that it does. Measures where the GPU is present, predicts\n"
        "where it is not."
    ),
    examples=(
        ("sglang-moe-ext tune --model GLM-4.7-Flash", "measure on the GPU of this machine"),
        (
            "sglang-moe-ext tune --model Qwen/Qwen3-30B-A3B-FP8 --gpu RTX_5090",
            "predict for a GPU that this machine does not have",
        ),
        ("sglang-moe-ext tune --model GLM-4.7-Flash --tp-size 4 --dry-run", "print the plan and the possible gain"),
        (
            "sglang-moe-ext tune --model GLM-4.7-Flash --configs 64 128 64 16 4 3",
            "time one configuration beside the one in use today",
        ),
        ("sglang-moe-ext tune --engine vllm --model Qwen3-30B-A3B --tp-size 2", "tune the kernel of vLLM"),
        (
            "sglang-moe-ext tune --kernel grouped_gemm --hidden-size 4096 --dtype fp8_w8a8 --block-shape 128,128",
            "tune this package's grouped GEMM, which then loads its table by itself",
        ),
        (
            'sglang-moe-ext tune --from-log "Config file not found at E=65,N=1536,device_name=NVIDIA_H200.json"',
            "tune the layer that a warning in the server's log is about",
        ),
    ),
    add_to=add_to,
    run=run,
    stopped=_stopped,
    succeeded=differing_layers.succeeded,
)
