"""`sglang-moe-ext bench`: backends of a layer side by side, on the GPU of this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sglang_moe_ext.cli import console, differing_layers, engine_choice, layer_flags, measure_args, tune
from sglang_moe_ext.cli.command import Command
from sglang_moe_ext.cli.console import Grid
from sglang_moe_ext.core import PROJECTIONS, Failure, MoEExtError
from sglang_moe_ext.engines.libraries.registry import LIBRARIES
from sglang_moe_ext.tables import files
from sglang_moe_ext.tuning import backends, config_args
from sglang_moe_ext.tuning.backends import OWN_BACKENDS, BackendComparison, TimedBackend
from sglang_moe_ext.tuning.config_args import Choices
from sglang_moe_ext.tuning.request import TuneRequest
from sglang_moe_ext.tuning.versions import version_of

DOCUMENT, TABLES = "bench.json", "bench.md"
_ALL = (*OWN_BACKENDS, *LIBRARIES)
_NOT_OFFERED = {
    "ask": False,
    "budget": None,
    "deadline": None,
    "dry_run": False,
    "force": False,
    "install": "none",
    "predict": False,
    "resume": False,
    "use_deep_gemm": False,
    "verbose": False,
}
"""Flags of `tune` that say nothing of a comparison."""


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    layer_flags.add_to(parser)
    layer_flags.add_engine_to(parser)
    parser.set_defaults(engine=None, **_NOT_OFFERED)
    what = parser.add_argument_group("what to compare")
    what.add_argument(
        "--backends",
        nargs="+",
        choices=_ALL,
        default=list(_ALL),
        metavar="NAME",
        help=f"of {', '.join(_ALL)}: gains are over the first that runs (default all)",
    )
    what.add_argument(
        "--configs",
        type=int,
        nargs="+",
        metavar="NUMBER",
        help=f"one configuration for both GEMMs too, with and without TMA: {' '.join(config_args.NUMBERS)}",
    )
    what.add_argument(
        "--tables",
        dest="cmp_configs",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="tables of configurations too",
    )
    what.add_argument(
        "--output-dir", type=Path, metavar="FOLDER", help=f"write the figures there too, as {DOCUMENT} and {TABLES}"
    )
    measure_args.add_how_to(parser)


def run(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Compare, print, and give the document.

    Raises:
        MoEExtError: any of this package's errors.
    """
    folder: Path | None = arguments.output_dir
    if folder is not None and not files.is_writable(folder):
        raise MoEExtError(f"cannot write {folder}: choose another --output-dir")
    if not arguments.from_log and (said := engine_choice.describe_choice(arguments.engine)):
        print(said)
    arguments.output_dir = None  # that of `tune` is for tables
    document = differing_layers.run(arguments, _run_layer)
    if folder is not None:
        texts = {folder / DOCUMENT: json.dumps(document, indent=1) + "\n", folder / TABLES: markdown(document)}
        files.write_together(texts)
        print(f"wrote {folder / DOCUMENT} and {folder / TABLES}")
    return document


def _run_layer(arguments: argparse.Namespace) -> Mapping[str, Any]:
    request = tune.request_of(arguments, arguments.command_line)
    if request.measuring is None:
        raise MoEExtError(
            f"nothing can be measured here: bench needs {request.gpu.device_name} and {request.adapter.TITLE} on this "
            "machine; `plan --worth-it` estimates without them"
        )
    given = _given(arguments, request)
    with console.Bar() as bar:
        found = backends.run(request, request.measuring, arguments.backends, given, bar)
    for tokens, compared in found.items():
        console.show(_grid(tokens, compared))
    return _document(request, found)


def _given(arguments: argparse.Namespace, request: TuneRequest) -> Choices:
    choices = config_args.parse_choices(arguments.configs, arguments.cmp_configs, request.tokens)
    tma = () if request.measuring is None else request.measuring.with_tma
    return backends.with_and_without_tma(choices, tma)


_COLUMNS = ("backend", "layer us", "gain", "95 %", "of roof", "error", "up us", "down us")


def _grid(tokens: int, compared: BackendComparison) -> Grid:
    noise = "" if compared.noise is None else f"; noise {100 * compared.noise:.1f} %"
    slowed = "" if compared.throttled is None else f"; the GPU slowed down: {compared.throttled}"
    rows = [_cells(name, result, compared) for name, result in compared.results.items()]
    title = f"M={tokens}, roofline of both GEMMs {compared.floor_us:.1f} us{noise}{slowed}"
    return Grid(title, _COLUMNS, rows, frozenset({"backend", "95 %"}))


def _cells(name: str, result: TimedBackend | Failure, compared: BackendComparison) -> list[str]:
    title = LIBRARIES[name].TITLE if name in LIBRARIES else name
    if isinstance(result, Failure):
        return [f"{title}: left out: {result.message[:160]}", *[""] * (len(_COLUMNS) - 1)]
    gain = ["-", "-"]
    if result.gain is not None:
        gain = [f"{result.gain.value:.3f}x", f"{result.gain.low:.3f} to {result.gain.high:.3f}"]
    gemms = [f"{result.gemm_us[it]:.1f}" if it in result.gemm_us else "-" for it in PROJECTIONS]
    return [
        title,
        f"{result.us:.1f}",
        *gain,
        f"{100 * compared.floor_us / result.us:.0f}%",
        f"{result.error:.1e}",
        *gemms,
    ]


def _document(request: TuneRequest, found: Mapping[int, BackendComparison]) -> Mapping[str, Any]:
    engine = request.adapter.find()
    return {
        "model": request.model,
        "shape": str(request.shape),
        "gpu": request.gpu.device_name,
        "engine": request.engine,
        "engine_version": None if engine is None else engine.version_text,
        "torch": version_of("torch"),
        "triton": version_of("triton"),
        "libraries": {name: version_of(library.PACKAGE) for name, library in LIBRARIES.items()},
        "command": request.command,
        "seed": request.seed,
        "batch_sizes": {str(tokens): _batch_document(compared) for tokens, compared in found.items()},
    }


def _batch_document(compared: BackendComparison) -> Mapping[str, Any]:
    return {
        "floor_us": compared.floor_us,
        "gemm_floor_us": dict(compared.gemm_floor_us),
        "noise": compared.noise,
        "throttled": compared.throttled,
        "backends": {
            name: {"left_out": result.message} if isinstance(result, Failure) else asdict(result)
            for name, result in compared.results.items()
        },
    }


def markdown(document: Mapping[str, Any]) -> str:
    """Layers as tables of batch sizes by backends: microseconds, and the speed-up over the first backend."""
    layers: Sequence[Mapping[str, Any]] = document.get("layers") or [document]
    return "\n\n".join(_layer_markdown(layer) for layer in layers if "batch_sizes" in layer) + "\n"


def _layer_markdown(layer: Mapping[str, Any]) -> str:
    of_m = layer["batch_sizes"]
    names = list(dict.fromkeys(name for batch in of_m.values() for name in batch["backends"]))
    running = [name for name in names if any("us" in batch["backends"].get(name, {}) for batch in of_m.values())]
    lines = [
        f"{layer['shape']}: {layer['gpu']}, {layer['engine']} {layer['engine_version']}, torch {layer['torch']}, "
        f"Triton {layer['triton']}: `{layer['command']}`",
        "",
        f"| M | {' | '.join(running)} |",
        f"|---:|{'---:|' * len(running)}",
    ]
    for tokens, batch in of_m.items():
        cells = [_markdown_cell(batch["backends"].get(name, {})) for name in running]
        lines.append(f"| {tokens} | {' | '.join(cells)} |")
    for name in names:
        results = (batch["backends"].get(name, {}) for batch in of_m.values())
        reasons = sorted({str(result["left_out"]) for result in results if "left_out" in result})
        lines += [f"\n{name} left out: {reason}" for reason in reasons]
    return "\n".join(lines)


def _markdown_cell(result: Mapping[str, Any]) -> str:
    if "us" not in result:
        return "-"
    gain = result["gain"]
    return f"{result['us']:.1f}" + ("" if gain is None or gain["value"] == 1.0 else f" ({gain['value']:.3f}x)")


COMMAND = Command(
    name="bench",
    summary="compare the engine's kernel, ours and other libraries' for a model, in one run",
    description=(
        "Compare backends of a fused-MoE layer on the GPU of this machine: the kernel of SGLang or vLLM as shipped\n"
        "and as tuned, the kernels of this package, and those of other libraries that are installed. Whole layers in\n"
        "turn, with a cold L2; each is held against float32 before it is timed, and left out with its reason where it\n"
        "cannot run or is wrong. Nothing is written into an engine."
    ),
    examples=(
        ("sglang-moe-ext bench --model GLM-4.7-Flash --batch-size 1 64 4096", "all backends at three batch sizes"),
        (
            "sglang-moe-ext bench --model Qwen3-30B-A3B --backends tuned triton_kernels --batch-size 16 512 8192",
            "the engine's kernel against matmul_ogs",
        ),
        (
            "sglang-moe-ext bench --model DeepSeek-R1 --tp-size 8 --backends tuned --configs 64 128 128 16 4 3",
            "one configuration beside the tuned one, with TMA and without",
        ),
    ),
    add_to=add_to,
    run=run,
    succeeded=differing_layers.succeeded,
)
