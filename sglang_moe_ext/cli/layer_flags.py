"""The flags that say which layer a command is about, on which GPU, at which numbers of tokens."""

from __future__ import annotations

import argparse
from typing import Any

from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.gpu import specs


class _ListGpus(argparse.Action):
    """Print the GPUs that --gpu knows, and end."""

    def __init__(self, option_strings: list[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the GPUs that --gpu knows, and end")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for gpu in specs.known_gpus().values():
            size = "" if gpu.memory_gib is None else f", {gpu.memory_gib:g} GiB"
            print(f"{gpu.device_name.replace(' ', '_')}  ({gpu.target}{size})")
        print("and MIG slices of them, such as NVIDIA_A100-SXM4-80GB_MIG_3g.40gb")
        parser.exit()


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the flags; those that upstream's tuning scripts have keep their names and meaning."""
    what = parser.add_argument_group("which layer")
    what.add_argument("--model", help="a built-in name, a folder with config.json, or a hub id")
    what.add_argument("--shape", help="its numbers: E=65,N=1536,K=2048,topk=5[,dtype=fp8_w8a8][,block_shape=[128,128]]")
    what.add_argument(
        "--from-log",
        metavar="TEXT",
        help="the server's warning about the missing table, as pasted, or the name of its log; --model, --tp-size and "
        "--ep-size decide where several launches fit",
    )
    what.add_argument(
        "--tp-size",
        "--tp",
        "-tp",
        "--tensor-parallel-size",
        type=int,
        help="tensor-parallel size of the server (default 1)",
    )
    what.add_argument("--ep-size", "--ep", type=int, help="expert-parallel size of the server (default 1)")
    what.add_argument(
        "--ep-num-redundant-experts",
        type=int,
        default=0,
        metavar="N",
        help="redundant experts of the server, as its flag of that name (default 0)",
    )
    what.add_argument(
        "--dtype",
        default="auto",
        help="auto (the checkpoint's), bf16, fp16, fp8_w8a8, int8_w8a8, int8_w8a16 or int4_w4a16",
    )
    what.add_argument(
        "--quantization",
        metavar="NAME",
        help="the server's flag of that name, such as moe_wna16, by which AWQ and GPTQ run Triton",
    )
    what.add_argument("--per-channel-quant", action="store_true", help="one scale for each output channel")
    what.add_argument("--disable-shared-experts-fusion", action="store_true", help="as the server's flag of that name")
    what.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code of the model's folder (default: never)"
    )
    what.add_argument("--gpu", help="the GPU that is meant, such as RTX_4090 (default: the GPU of this machine)")
    what.add_argument("--list-gpus", action=_ListGpus)
    what.add_argument("--batch-size", type=int, nargs="+", metavar="M", help="numbers of tokens (default: 1 to 16384)")


def add_engine_to(parser: argparse.ArgumentParser) -> None:
    """Add --engine, and the flags that only vLLM's tuning script has."""
    whose = parser.add_argument_group("whose layer")
    whose.add_argument(
        "--engine",
        choices=tuple(ENGINES),
        help="the engine to tune (default: that of the pasted line, else the one installed, else sglang)",
    )
    whose.add_argument(
        "--enable-expert-parallel",
        "-enable-ep",
        action="store_true",
        help="vLLM: each of the --tp-size ranks has whole experts",
    )
    whose.add_argument("--model-prefix", metavar="NAME", help="the section of config.json that describes the experts")
