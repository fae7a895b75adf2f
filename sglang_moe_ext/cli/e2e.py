"""`sglang-moe-ext e2e`: a server with and without the plugin, measured in turn by a client."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_moe_ext.cli import console, e2e_args, engine_choice
from sglang_moe_ext.cli.command import Command
from sglang_moe_ext.cli.console import Grid
from sglang_moe_ext.core import EngineError, MoEExtError
from sglang_moe_ext.e2e import report
from sglang_moe_ext.e2e.client import Client
from sglang_moe_ext.e2e.measure import Cases, Turn
from sglang_moe_ext.e2e.turns import Addresses, Launched, take_turns
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.engines.generation import APIS
from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.engines.sglang import installation as sglang_installation
from sglang_moe_ext.engines.sglang.server_client import address, clean_key
from sglang_moe_ext.engines.vllm import installation as vllm_installation
from sglang_moe_ext.serving import sglang_hooks, vllm_hooks
from sglang_moe_ext.serving.table_search import TableDir
from sglang_moe_ext.tables import files
from sglang_moe_ext.untrusted import show


def run(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Measure the servers in turn, and give the document of what was found.

    Raises:
        MoEExtError: the flags make no sense, or a folder cannot be written.
    """
    cases = e2e_args.cases_of(arguments)
    e2e_args.check_servers(arguments)
    engine = engine_choice.choose(arguments.engine)
    client = Client(
        "",
        APIS[engine],
        vocabulary=arguments.vocabulary,
        api_key=clean_key(arguments.api_key),
        timeout_s=arguments.timeout,
    )
    measurer = e2e_args.MEASURERS[arguments.client]
    stated = {"engine": engine, "client": arguments.client, "order": arguments.order}

    def keep(turns: list[Turn]) -> None:
        if arguments.output_dir is not None:
            _write(arguments.output_dir, {**stated, **report.document(turns, cases)}, turns, cases)

    with contextlib.ExitStack() as held, console.Bar() as bar:
        servers = _servers(arguments, engine, held)
        turns = take_turns(servers, arguments.order, cases, client, measurer, bar, keep)
    _print(turns, cases)
    if arguments.output_dir is not None:
        print(f"wrote {arguments.output_dir / e2e_args.DOCUMENT} and {arguments.output_dir / e2e_args.TABLES}")
    return {**stated, **report.document(turns, cases)}


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
        {
            folder / e2e_args.DOCUMENT: json.dumps(document, indent=1) + "\n",
            folder / e2e_args.TABLES: "\n\n".join(parts) + "\n",
        }
    )


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
    add_to=e2e_args.add_to,
    run=run,
    stopped=lambda _: "stopped; servers that were started are ended, and --output-dir has the turns that were whole",
    succeeded=report.is_whole,
)
