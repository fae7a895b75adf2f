"""`sglang-moe-ext e2e`: a server with and without the plugin, measured in turn by a client."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_moe_ext.cli import console, engine_choice
from sglang_moe_ext.cli.command import Command
from sglang_moe_ext.cli.console import Grid
from sglang_moe_ext.core import EngineError, MoEExtError
from sglang_moe_ext.e2e import report
from sglang_moe_ext.e2e.client import VOCABULARY, Client
from sglang_moe_ext.e2e.engine_measurer import EngineMeasurer
from sglang_moe_ext.e2e.measure import Cases, Kind, Measurer, OwnMeasurer, Turn
from sglang_moe_ext.e2e.turns import Addresses, Launched, take_turns
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.engines.generation import APIS
from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.engines.sglang import installation as sglang_installation
from sglang_moe_ext.engines.sglang.server_client import LONGEST_S, address, clean_key
from sglang_moe_ext.engines.vllm import installation as vllm_installation
from sglang_moe_ext.serving import sglang_hooks, vllm_hooks
from sglang_moe_ext.serving.table_search import TableDir
from sglang_moe_ext.tables import files
from sglang_moe_ext.untrusted import show

INPUT_LENGTHS = tuple(range(512, 8192 + 1, 512))
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ORDER: tuple[Kind, ...] = ("stock", "plugin", "stock")
DOCUMENT, TABLES = "e2e.json", "e2e.md"
_MOST = 1_000_000
_MEASURERS: dict[str, Callable[[Client], Measurer]] = {"own": OwnMeasurer, "engine": EngineMeasurer}


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
        choices=tuple(_MEASURERS),
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


def _cases(arguments: argparse.Namespace) -> Cases:
    """Raises MoEExtError where a number makes no sense."""
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


def run(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Measure the servers in turn, and give the document of what was found.

    Raises:
        MoEExtError: the flags make no sense, or a folder cannot be written.
    """
    cases = _cases(arguments)
    _check_servers(arguments)
    engine = engine_choice.choose(arguments.engine)
    client = Client(
        "",
        APIS[engine],
        vocabulary=arguments.vocabulary,
        api_key=clean_key(arguments.api_key),
        timeout_s=arguments.timeout,
    )
    with contextlib.ExitStack() as held, console.Bar() as bar:
        servers = _servers(arguments, engine, held)
        turns = take_turns(servers, arguments.order, cases, client, _MEASURERS[arguments.client], bar)
    document = {"engine": engine, "client": arguments.client, "order": arguments.order, **report.document(turns, cases)}
    _print(turns, cases)
    if arguments.output_dir is not None:
        _write(arguments.output_dir, document, turns, cases)
    return document


def _servers(arguments: argparse.Namespace, engine: EngineName, held: contextlib.ExitStack) -> Launched | Addresses:
    """Raises MoEExtError where the engine is not installed, or the folder cannot be written."""
    folder: Path | None = arguments.output_dir
    if folder is not None and not files.is_writable(folder):
        raise MoEExtError(f"cannot write {show(str(folder))}: choose another --output-dir")
    if arguments.client == "engine" and ENGINES[engine].find() is None:
        raise EngineError(f"--client engine: {ENGINES[engine].TITLE} is not installed here, leave the flag out")
    if arguments.urls is not None:
        stock, plugin = map(address, arguments.urls)
        return Addresses({"stock": stock, "plugin": plugin})
    if ENGINES[engine].find() is None:
        raise EngineError(f"{ENGINES[engine].TITLE} is not installed here: run it where the server runs")
    _print_tuned_tables(engine)
    if folder is None:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="sglang_moe_ext-")))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoEExtError(f"cannot make {show(str(folder))}: {error.strerror}; choose another --output-dir") from error
    return Launched(tuple(arguments.launch), arguments.start_timeout, folder)


def _check_servers(arguments: argparse.Namespace) -> None:
    """Raises MoEExtError where they are named twice, or not at all."""
    if (arguments.urls is None) == (not arguments.launch):
        raise MoEExtError("expected either --urls STOCK PLUGIN, or the arguments of a server after --")
    if arguments.urls is not None:
        for url in arguments.urls:
            address(url)
    if any(word == "--port" or word.startswith("--port=") for word in arguments.launch):
        raise MoEExtError("--port: leave it out; each server gets a free one")


def _print_tuned_tables(engine: EngineName) -> None:
    """Say so where stock is not what the engine ships, as `tune` wrote into it."""
    sglang, vllm = sglang_installation.find(), vllm_installation.find()
    dirs: Sequence[TableDir] = ()
    if engine == "sglang" and sglang is not None:
        dirs = sglang_hooks.table_dirs(sglang)
    elif engine == "vllm" and vllm is not None:
        dirs = vllm_hooks.table_dirs(vllm)
    own = [one.root for one in dirs if one.is_engines and one.root.is_dir()]
    written = sum(1 for root in own for _ in root.rglob("*.provenance.json"))
    if written:
        print(
            f"note: `tune` has written {written} tables into the engine's own folder, which stock reads too; "
            "`sglang-moe-ext clean` removes them"
        )


def _print(turns: list[Turn], cases: Cases) -> None:
    for line in report.remarks(turns):
        print(line)
    if cases.input_lengths:
        title = (
            "time to the first token, one prompt at a time; ±: standard deviation, of the reduction its 95 % interval"
        )
        console.show(Grid(title, report.PREFILL_COLUMNS, report.prefill_rows(turns, cases)))
    if cases.batches:
        title = f"decode: {cases.decode_input} tokens in, {cases.decode_output} out, so many requests at once"
        console.show(Grid(title, report.DECODE_COLUMNS, report.decode_rows(turns, cases)))


def _write(folder: Path, document: Mapping[str, Any], turns: list[Turn], cases: Cases) -> None:
    parts = [report.markdown(report.PREFILL_COLUMNS, report.prefill_rows(turns, cases))] if cases.input_lengths else []
    parts += [report.markdown(report.DECODE_COLUMNS, report.decode_rows(turns, cases))] if cases.batches else []
    files.write_together(
        {folder / DOCUMENT: json.dumps(document, indent=1) + "\n", folder / TABLES: "\n\n".join(parts) + "\n"}
    )
    print(f"wrote {folder / DOCUMENT} and {folder / TABLES}")


COMMAND = Command(
    name="e2e",
    summary="measure a whole server with and without the plugin",
    description=(
        "Measure a server without the plugin, with it, and without it again: mean time to the first token and\n"
        "requests a second by input length, tokens a second by batch size, with their spread. Starts the servers\n"
        "itself, with the arguments after --, and ends them with all of their children; or asks two that run."
    ),
    examples=(
        (
            "sglang-moe-ext e2e --output-dir e2e -- --model-path Qwen/Qwen3-30B-A3B-FP8 --tp 1",
            "start SGLang three times, and measure each",
        ),
        (
            "sglang-moe-ext e2e --urls http://127.0.0.1:30000 http://127.0.0.1:30001",
            "measure two servers that run, the first without the plugin",
        ),
    ),
    add_to=add_to,
    run=run,
    stopped=lambda _: "stopped; the servers that this command started are ended",
    succeeded=report.is_whole,
)
