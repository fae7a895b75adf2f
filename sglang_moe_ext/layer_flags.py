"""The flags that say which layer a command is about, the same in every command."""

from __future__ import annotations

import argparse

from sglang_moe_ext.engines.known import ENGINES, SGLANG


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the flags; those that upstream's tuning scripts have keep their names and meaning."""
    what = parser.add_argument_group("which layer")
    what.add_argument("--model", help="a built-in name, a folder with config.json, or a hub id")
    what.add_argument("--shape", help="its numbers: E=65,N=1536,K=2048,topk=5[,dtype=fp8_w8a8][,block_shape=[128,128]]")
    what.add_argument("--from-log", metavar="LINE", help="the server's own warning about the missing table, pasted")
    what.add_argument(
        "--tp-size",
        "--tp",
        "-tp",
        "--tensor-parallel-size",
        type=int,
        default=1,
        help="tensor-parallel size of the server (default 1)",
    )
    what.add_argument("--ep-size", "--ep", type=int, default=1, help="expert-parallel size of the server (default 1)")
    what.add_argument(
        "--dtype",
        default="auto",
        help="auto (the checkpoint's), bf16, fp16, fp8_w8a8, int8_w8a8, int8_w8a16 or int4_w4a16",
    )
    what.add_argument("--per-channel-quant", action="store_true", help="one scale for each output channel")
    what.add_argument("--disable-shared-experts-fusion", action="store_true", help="as the server's flag of that name")
    what.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the model's folder brings (default: never)"
    )
    what.add_argument("--gpu", help="the GPU that is meant, such as RTX_4090 (default: this machine's)")
    what.add_argument("--batch-size", type=int, nargs="+", metavar="M", help="numbers of tokens (default: 1 to 16384)")


def add_engine_to(parser: argparse.ArgumentParser) -> None:
    """Add --engine, and the flags that only vLLM's tuning script has."""
    whose = parser.add_argument_group("whose layer")
    whose.add_argument(
        "--engine", choices=tuple(ENGINES), default=SGLANG.NAME, help="the engine that is tuned (default sglang)"
    )
    whose.add_argument(
        "--enable-expert-parallel",
        "-enable-ep",
        action="store_true",
        help="vLLM: experts lie on the ranks of --tp-size, each whole",
    )
    whose.add_argument("--model-prefix", metavar="NAME", help="the section of config.json that describes the experts")
