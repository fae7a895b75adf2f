"""`sglang-moe-ext tune --kernel grouped_gemm`: tune this package's grouped GEMM over rows in the order of experts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sglang_moe_ext.cli import console, gpu_args, layer_args
from sglang_moe_ext.core import GpuError, ModelError, MoEShape, Quantization
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.models import parse_dtype_flag
from sglang_moe_ext.tuning import grouped_gemm, grouped_gemm_results
from sglang_moe_ext.tuning.bench import routing
from sglang_moe_ext.tuning.grouped_gemm import GroupedGemmRequest

KERNELS = ("fused_moe", "grouped_gemm")
DTYPES = ("auto", "float16", "bfloat16", "float32", "fp8_w8a8", "int8_w8a16", "int8_w8a8")
_EXPERTS = 8
"""With --hidden-size alone, beside which the weights are square."""


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this kernel; they are those of SGLang's former script for it."""
    which = parser.add_argument_group("which kernel")
    which.add_argument(
        "--kernel",
        choices=KERNELS,
        default=KERNELS[0],
        help="the engine's MoE kernel, or sglang_moe_ext.kernels.grouped_gemm (default fused_moe)",
    )
    which.add_argument("--hidden-size", type=int, metavar="K", help="grouped_gemm: its K, instead of --model")
    which.add_argument("--block-shape", metavar="N,K", help="grouped_gemm: weights that share one scale, as 128,128")
    which.add_argument("--no-tune", action="store_true", help="grouped_gemm: only measure what runs today")


def refuse_elsewhere(arguments: argparse.Namespace) -> None:
    """Raises ModelError where a flag of this kernel is given for the other one."""
    given = {
        "--hidden-size": arguments.hidden_size is not None,
        "--block-shape": arguments.block_shape is not None,
        "--no-tune": arguments.no_tune,
    }
    flag = next((flag for flag, is_given in given.items() if is_given), None)
    if flag is not None:
        raise ModelError(f"{flag} is about another kernel: add --kernel grouped_gemm, or leave it out")


def request_of(arguments: argparse.Namespace) -> GroupedGemmRequest:
    """What the flags ask for.

    Raises:
        MoEExtError: they make no sense together, or there is no GPU here.
    """
    _refuse_unheeded(arguments)
    name, shape = _shape(arguments)
    gpu = specs.detect()
    if gpu is None:
        raise GpuError("this machine has no GPU: grouped_gemm is measured, not predicted; run it where the GPU is")
    if gpu.target.is_amd:
        raise GpuError(f"{gpu.device_name} is an AMD GPU: grouped_gemm is our kernel for NVIDIA's; leave it out")
    return GroupedGemmRequest(
        name=name,
        shape=shape,
        gpu=gpu,
        rows=gpu_args.tokens_of(arguments, grouped_gemm.DEFAULT_ROWS),
        effort=arguments.effort,
        seed=arguments.seed,
        command=arguments.command_line,
        output_dir=arguments.output_dir,
        searches=not arguments.no_tune,
        resume=arguments.resume,
    )


_UNHEEDED = {
    **dict.fromkeys(("predict", "dry_run", "force"), False),
    **dict.fromkeys(("gpu", "gpus", "ray", "budget", "topk_ids_dir", "configs", "engine")),
    "cmp_configs": (),
    "routing": routing.MIXED.name,
    "kernels": "all",
    "install": "engine",
}
"""Flags that say nothing of this kernel, with what they are where they are not given."""


def _refuse_unheeded(arguments: argparse.Namespace) -> None:
    """Raises ModelError where such a flag is given."""
    word = next((word for word, absent in _UNHEEDED.items() if getattr(arguments, word) != absent), None)
    if word is not None:
        raise ModelError(f"--{word.replace('_', '-')} does not go with --kernel grouped_gemm: leave it out")


def _shape(arguments: argparse.Namespace) -> tuple[str, MoEShape]:
    dtype, block = arguments.dtype, _block(arguments.block_shape)
    if dtype not in DTYPES:
        raise ModelError(f"--dtype {dtype}: grouped_gemm takes {', '.join(DTYPES)}")
    if arguments.hidden_size is not None and layer_args.names_a_layer(arguments):
        raise ModelError("--hidden-size and a layer: choose one; both say how large the GEMM is")
    if arguments.hidden_size is not None:
        if arguments.hidden_size < 1:
            raise ModelError(f"--hidden-size {arguments.hidden_size}: expected a positive number, such as 4096")
        size = arguments.hidden_size
        name, shape = f"hidden size {size}", MoEShape(_EXPERTS, size, size, 1, gated=False)
    else:
        auto = argparse.Namespace(**{**vars(arguments), "dtype": "auto", "per_channel_quant": False})
        layer = layer_args.parse_layer(auto)
        name, shape = layer.name, layer.shape
    quantization = _quantization(arguments, dtype, block, shape.quantization)
    is_unquantized = dtype in ("float16", "bfloat16", "float32")
    return name, replace(shape, top_k=1, ep=1, fused_shared=0, quantization=quantization,
                         dtype=dtype if is_unquantized else shape.dtype)  # fmt: skip


def _quantization(
    arguments: argparse.Namespace, dtype: str, block: tuple[int, int] | None, known: Quantization
) -> Quantization:
    """Raises MoEExtError where the kernel cannot multiply such weights, or the flags contradict each other."""
    if dtype in ("float16", "bfloat16", "float32"):
        if block is not None:
            raise ModelError(f"--block-shape: {dtype} has no scales: leave it out, or choose --dtype fp8_w8a8")
        return Quantization()
    by_channel = arguments.per_channel_quant or (block is None and dtype in ("int8_w8a16", "int8_w8a8"))
    found = parse_dtype_flag(dtype, checkpoint=known, per_channel=by_channel, block_shape=block)
    from sglang_moe_ext.kernels import expert_gemm

    expert_gemm.scaling_of(found)
    return found


def _block(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.strip("[]() ").split(",")
    if len(parts) != 2 or not all(part.strip().isascii() and part.strip().isdecimal() for part in parts):
        raise ModelError(f"--block-shape {text}: expected N,K, such as 128,128")
    n, k = map(int, parts)
    return n, k


def run(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Measure, write the table, and give the document of what was done.

    Raises:
        MoEExtError: any of this package's errors.
    """
    request = request_of(arguments)
    columns, k = request.shape.gemm("up")
    print(f"{request.name}: {request.shape.experts} experts, [rows, {k}] x [{columns}, {k}], {request.key.file_name}")
    with console.Bar() as bar:
        found = grouped_gemm.run(request, bar)
    written = grouped_gemm_results.write(request, found) if request.searches else ()
    console.show(grid(request, grouped_gemm_results.document(request, found, written)))
    for path in written:
        print(f"wrote {path}")
    if not request.searches:
        print("nothing was written, as --no-tune asks")
    return grouped_gemm_results.document(request, found, written)


def grid(request: GroupedGemmRequest, document: Mapping[str, Any]) -> console.Grid:
    """The table for people, from the document."""
    rows = [
        (
            m,
            f"{one['today_us']:.1f}",
            f"{one['us']:.1f}",
            f"{one['gain'][1]:.3f} [{one['gain'][0]:.3f}, {one['gain'][2]:.3f}]",
            "-" if one["floor_us"] is None else f"{100 * one['floor_us'] / one['us']:.0f} %",
            f"{one['error']:.1e}",
            " ".join(str(one["config"][field]) for field in _FIELDS),
        )
        for m, one in document["rows"].items()
    ]
    columns = ("rows", "today us", "us", "gain [95 %]", "of roofline", "error", "configuration")
    return console.Grid(f"grouped_gemm on {request.gpu.device_name}", columns, rows, frozenset({"configuration"}))


_FIELDS = ("block_m", "block_n", "block_k", "group_m", "num_warps", "num_stages")
