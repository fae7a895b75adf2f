"""`python -m sglang_moe_ext.tune`: find the best kernel configurations for a model on a GPU, install them, prove the pick-up."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sglang_moe_ext import gpus, report, terminal
from sglang_moe_ext.core import Gpu, GpuError, ModelError, MoEExtError, MoEShape, Parallelism
from sglang_moe_ext.engines.sglang import installation, sharding, warning_line
from sglang_moe_ext.shapes import builtin_models, parse_dtype_flag, parse_shape, resolve
from sglang_moe_ext.tuning import pipeline
from sglang_moe_ext.tuning.plan import DEFAULT_TOKENS, Plan
from sglang_moe_ext.tuning.request import Request

_EXAMPLES = """examples:
  python -m sglang_moe_ext.tune --model GLM-4.7-Flash                       measure on the GPU of this machine
  python -m sglang_moe_ext.tune --model GLM-4.7-Flash --gpu RTX_4090        predict for a GPU that is not here
  python -m sglang_moe_ext.tune --model /models/mine --tp 4 --dry-run       only say what would be done
  python -m sglang_moe_ext.tune --from-log "... Config file not found at .../E=65,N=1536,device_name=...json"
"""


def parser() -> argparse.ArgumentParser:
    """The flags; those that upstream's tuning scripts have keep their names and meaning."""
    flags = argparse.ArgumentParser(
        prog="python -m sglang_moe_ext.tune",
        description="Find the best configurations of the fused-MoE kernel, install them, and prove that SGLang takes them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = flags.add_argument_group("what to tune")
    what.add_argument("--model", help="a built-in name, a folder with config.json, or a hub id")
    what.add_argument("--shape", help="a layer by its numbers: E=65,N=1536,K=2048,topk=5[,dtype=fp8_w8a8][,block_shape=[128,128]]")
    what.add_argument("--from-log", metavar="LINE", help="the server's own warning about the missing table, pasted")
    what.add_argument("--tp-size", "--tp", type=int, default=1, help="tensor-parallel size of the server (default 1)")
    what.add_argument("--ep-size", "--ep", type=int, default=1, help="expert-parallel size of the server (default 1)")
    what.add_argument("--dtype", default="auto", help="auto (the checkpoint's), bf16, fp16, fp8_w8a8, int8_w8a8, int8_w8a16, int4_w4a16")
    what.add_argument("--per-channel-quant", action="store_true", help="one scale for each output channel")
    what.add_argument("--disable-shared-experts-fusion", action="store_true", help="as the server's flag of that name")
    what.add_argument("--trust-remote-code", action="store_true", help="run code that the model's folder brings (default: never)")
    what.add_argument("--batch-size", type=int, nargs="+", metavar="M", help="numbers of tokens (default: 20 from 1 to 16384)")
    how = flags.add_argument_group("how")
    how.add_argument("--gpu", help="the GPU to tune for, such as RTX_4090 (default: this machine's)")
    how.add_argument("--predict", action="store_true", help="do not measure, even where the GPU is here")
    how.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    how.add_argument("--seed", type=int, default=0, help="of the random weights, inputs and routings (default 0)")
    where = flags.add_argument_group("where to")
    where.add_argument("--install", choices=("engine", "overlay", "none"), default="engine", help="where the server shall find the tables; none: only your own store keeps them (default engine)")
    where.add_argument("--output-dir", type=Path, help="write configs/triton_X_Y_Z/ there instead of installing")
    flags.add_argument("-v", "--verbose", action="store_true", help="say why each candidate is left out")
    return flags


def _stated(arguments: argparse.Namespace) -> tuple[str, MoEShape, str | None]:
    """(name, shape, device name where the log line has one) of what the user wants tuned."""
    given = [flag for flag in ("model", "shape", "from_log") if getattr(arguments, flag)]
    if given == ["from_log"]:
        return _from_log(arguments.from_log)
    if len(given) != 1:
        raise ModelError("expected exactly one of --model, --shape and --from-log")
    if arguments.shape:
        shape = parse_shape(arguments.shape)
        return str(shape), shape, None
    model = resolve(arguments.model, trust_remote_code=arguments.trust_remote_code)
    quantisation = parse_dtype_flag(
        arguments.dtype, checkpoint=model.quantisation, per_channel=arguments.per_channel_quant
    )
    if arguments.dtype in ("fp16", "float16"):
        model = replace(model, dtype="float16")
    engine = installation.find()
    shape = sharding.launched_shape(
        replace(model, quantisation=quantisation),
        Parallelism(arguments.tp_size, arguments.ep_size),
        engine_version=sharding.NEWEST if engine is None else engine.version,
        fuse_shared_experts=not arguments.disable_shared_experts_fusion,
    )
    return model.name, shape, None


def _from_log(line: str) -> tuple[str, MoEShape, str | None]:
    key = warning_line.missing_table(line)
    engine = installation.find()
    version = sharding.NEWEST if engine is None else engine.version
    guesses = warning_line.guesses(key, builtin_models().values(), version)
    layers = {replace(guess.shape, ep=1, fused_shared=0) for guess in guesses}
    if len(layers) == 1:
        return guesses[0].model.name, guesses[0].shape, warning_line.device_of(key)
    named = ", ".join(guess.model.name for guess in guesses) or "no built-in model"
    raise ModelError(
        f"the line's table (E={key.experts}, N={key.intermediate_size}) does not say the hidden size and top-k, and "
        f"{named} asks for it: add them with --shape E={key.experts},N={key.intermediate_size},K=...,topk=..."
        if len(layers) == 0
        else f"several models ask for the line's table, with different hidden sizes or top-k: {named}; name yours with --model"
    )


def _gpu(name: str | None, from_log: str | None) -> tuple[Gpu, bool]:
    """(the GPU to tune for, whether this machine has it)."""
    here = gpus.detect()
    wanted = name or from_log
    if wanted is None:
        if here is None:
            raise GpuError("this machine has no GPU: name the one to tune for, such as --gpu RTX_4090 or --gpu H200")
        return here, True
    gpu = gpus.find(wanted)
    return gpu, here is not None and here.device_name == gpu.device_name


def _tokens(arguments: argparse.Namespace) -> tuple[int, ...]:
    tokens = tuple(dict.fromkeys(arguments.batch_size or DEFAULT_TOKENS))
    wrong = next((m for m in tokens if not 1 <= m <= 1_000_000), None)
    if wrong is not None:
        raise ModelError(f"--batch-size {wrong}: expected numbers of tokens from 1 to 1000000")
    return tuple(sorted(tokens))


def request_of(arguments: argparse.Namespace) -> Request:
    """What the flags ask for.

    Raises:
        MoEExtError: they make no sense together, or name nothing known.
    """
    name, shape, device = _stated(arguments)
    gpu, is_here = _gpu(arguments.gpu, device)
    return Request(
        model=name,
        shape=shape,
        gpu=gpu,
        gpu_is_here=is_here,
        tokens=_tokens(arguments),
        measure=is_here and not arguments.predict and installation.find() is not None,
        install=arguments.install,
        output_dir=arguments.output_dir,
        seed=arguments.seed,
        command=shlex.join(["python", "-m", "sglang_moe_ext.tune", *arguments.given]),
    )


def _say_plan(request: Request, made: Plan) -> None:
    print(f"{request.model}: {request.shape}")
    gpu = request.gpu
    where = "here" if request.gpu_is_here else "not here"
    print(f"{gpu.device_name} ({where}): sm_{gpu.sm}, {gpu.smem_per_block} B of shared memory a block, {gpu.source}")
    for engine, name in report.names_of(request).items():
        print(f"  {engine}: {name}")
    terminal.show(report.candidates(made))
    terminal.show(report.forecast(made))
    doing = "measure" if made.measures else "predict"
    print(f"will {doing} {len(made.rows)} batch sizes with {made.binaries} binaries, in about {made.estimated_s:.0f} s")


def _say_outcome(request: Request, outcome: pipeline.Outcome) -> None:
    terminal.show(report.results(request, outcome))
    if not outcome.kernel.is_engines_own:
        print("no SGLang is installed here: compiled from this package's own kernel, which has the same tiles")
    if report.origin(outcome) == "predicted":
        print("PREDICTED: compiled for this GPU, fits and does not spill; ranked by a model, not timed")
    for path in outcome.written:
        print(f"wrote {path}")
    for path, why in outcome.refused.items():
        print(f"kept  {path}: {why}")
    if outcome.destination is not None and outcome.destination.note:
        print(outcome.destination.note)
    if outcome.answer is not None:
        answer = outcome.answer
        pretence = "" if request.gpu_is_here else ", told that it runs on this GPU"
        print(f"picked up: SGLang {answer.engine_version} with Triton {answer.triton}, asked in a fresh process{pretence}:")
        for line in answer.log:
            print(f"  {line}")
    elif outcome.destination is None:
        print("not installed: run this again where SGLang is, or with --output-dir")


def run(arguments: argparse.Namespace) -> int:
    """Do what the flags say; the last line is JSON.

    Raises:
        MoEExtError: any of ours.
    """
    request = request_of(arguments)
    engine = installation.find()
    if request.gpu_is_here and engine is None and not arguments.predict:
        print("SGLang is not installed here, and only its own kernel is worth measuring: predicting instead")
    with terminal.Bar() as bar:
        bar("ask", 0, 1)
        answer = pipeline.ask_incumbents(request, engine)
        bar("ask", 1, 1)
        made = pipeline.plan_of(request, answer)
        if arguments.dry_run:
            outcome = None
        else:
            outcome = pipeline.run(request, answer, made, bar)
    if outcome is None:
        _say_plan(request, made)
        print(json.dumps(report.plan_document(request, made)))
    else:
        _say_outcome(request, outcome)
        print(json.dumps(report.document(request, outcome)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 an error of ours in one line, 2 usage."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(given)
    arguments.given = given
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(message)s")
    try:
        return run(arguments)
    except MoEExtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: nothing was written", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
