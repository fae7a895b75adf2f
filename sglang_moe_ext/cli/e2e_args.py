"""The flags of `e2e`: which servers, and what is measured of each."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from sglang_moe_ext.cli import engine_choice
from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.e2e.client import VOCABULARY, Client
from sglang_moe_ext.e2e.engine_measurer import EngineMeasurer
from sglang_moe_ext.e2e.measure import Cases, Kind, Measurer, OwnMeasurer
from sglang_moe_ext.engines.sglang.server_client import LONGEST_S, address

INPUT_LENGTHS = tuple(range(512, 8192 + 1, 512))
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ORDER: tuple[Kind, ...] = ("stock", "plugin", "stock")
DOCUMENT, TABLES = "e2e.json", "e2e.md"
MEASURERS: dict[str, Callable[[Client], Measurer]] = {"own": OwnMeasurer, "engine": EngineMeasurer}
_MOST = 1_000_000


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    engine_choice.add_to(parser)
    which = parser.add_argument_group("which servers")
    which.add_argument(
        "--urls", nargs=2, metavar=("STOCK", "PLUGIN"), help="two servers that run, instead of arguments to start them"
    )
    which.add_argument("--api-key", help="as the servers' flag of that name")
    which.add_argument(
        "--order",
        nargs="+",
        choices=("stock", "plugin"),
        default=list(ORDER),
        metavar="KIND",
        help="the turns of stock and plugin (default stock plugin stock, so that stock is held against itself)",
    )
    which.add_argument(
        "--start-timeout", type=float, default=1800.0, metavar="S", help="for a server to be healthy (default 1800)"
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--input-lengths",
        type=int,
        nargs="*",
        default=list(INPUT_LENGTHS),
        metavar="TOKENS",
        help="of prompts, for the time to the first token (default 512 to 8192 in steps of 512)",
    )
    what.add_argument("--prompts", type=int, default=10, metavar="N", help="of each length, in turn (default 10)")
    what.add_argument(
        "--batch-size",
        type=int,
        nargs="*",
        default=list(BATCHES),
        metavar="N",
        help="requests at once, for the throughput of decode (default 1 to 256)",
    )
    what.add_argument("--runs", type=int, default=3, metavar="N", help="of each batch size (default 3)")
    what.add_argument(
        "--decode-input", type=int, default=32, metavar="TOKENS", help="of a batch's prompts (default 32)"
    )
    what.add_argument(
        "--decode-output", type=int, default=128, metavar="TOKENS", help="that each request generates (default 128)"
    )
    what.add_argument(
        "--client",
        choices=tuple(MEASURERS),
        default="own",
        help="own, or the engine's benchmark client, which has to be installed here and starts anew for each case: "
        "sglang.bench_serving, vllm bench serve (default own)",
    )
    what.add_argument(
        "--vocabulary",
        type=int,
        default=VOCABULARY,
        metavar="IDS",
        help=f"prompts are drawn from so many token ids, no more than the model has (default {VOCABULARY})",
    )
    what.add_argument("--timeout", type=float, default=600.0, metavar="S", help="for one request (default 600)")
    what.add_argument("--seed", type=int, default=0, help="of the prompts that are drawn (default 0)")
    what.add_argument(
        "--output-dir", type=Path, metavar="FOLDER", help=f"for {DOCUMENT}, {TABLES} and the servers' logs"
    )
    parser.add_argument(
        "launch", nargs="*", metavar="-- ARGUMENTS", help="of the server that is started, such as -- --model-path ..."
    )


def cases_of(arguments: argparse.Namespace) -> Cases:
    """What the flags ask of each server.

    Raises:
        MoEExtError: a number makes no sense.
    """
    for flag in ("prompts", "runs", "decode_input", "decode_output", "vocabulary"):
        if not 1 <= getattr(arguments, flag) <= _MOST:
            name = f"--{flag.replace('_', '-')}"
            raise MoEExtError(f"{name} {getattr(arguments, flag)}: expected a number from 1 to {_MOST}")
    for flag, most in (("input_lengths", _MOST), ("batch_size", 4096)):
        wrong = next((number for number in getattr(arguments, flag) if not 1 <= number <= most), None)
        if wrong is not None:
            raise MoEExtError(f"--{flag.replace('_', '-')} {wrong}: expected numbers from 1 to {most}")
    for flag in ("timeout", "start_timeout"):
        if not 0 < getattr(arguments, flag) <= LONGEST_S:
            raise MoEExtError(f"--{flag.replace('_', '-')}: expected seconds above 0, of at most {LONGEST_S:.0f}")
    return Cases(
        input_lengths=tuple(sorted(set(arguments.input_lengths))),
        prompts=arguments.prompts,
        batches=tuple(sorted(set(arguments.batch_size))),
        runs=arguments.runs,
        decode_input=arguments.decode_input,
        decode_output=arguments.decode_output,
        seed=arguments.seed,
    )


def check_servers(arguments: argparse.Namespace) -> None:
    """Refuse servers that are named twice, or not at all.

    Raises:
        MoEExtError: the message names the flag.
    """
    if (arguments.urls is None) == (not arguments.launch):
        raise MoEExtError("expected either --urls STOCK PLUGIN, or the arguments of a server after --")
    if arguments.urls is not None:
        for url in arguments.urls:
            address(url)
    if any(word == "--port" or word.startswith("--port=") for word in arguments.launch):
        raise MoEExtError("--port: leave it out; each server gets a free one")
