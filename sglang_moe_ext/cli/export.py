"""`sglang-moe-ext export`: from the journal of a measuring run in one engine to a table for the other."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_moe_ext.cli.command import Command
from sglang_moe_ext.core import EngineError, StoreError
from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.tables import merge
from sglang_moe_ext.tables.merge import RefusedTable, StoredTable
from sglang_moe_ext.tables.provenance import Provenance
from sglang_moe_ext.tuning import install_target, results_to_tables, transfer
from sglang_moe_ext.tuning.run import journal_reader, run_folder
from sglang_moe_ext.tuning.transfer import JournalSource

_COMMAND = "sglang-moe-ext export"


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "journal",
        type=Path,
        nargs="?",
        help="the journal.jsonl of a tuning run, or its folder (default: the newest run)",
    )
    parser.add_argument("--engine", choices=tuple(ENGINES), required=True, help="engine that the table is for")
    parser.add_argument(
        "--output-dir", "--save-dir", type=Path, help="folder to write the table to, in addition to your own store"
    )
    parser.add_argument(
        "--fused-shared-experts",
        type=int,
        default=0,
        metavar="N",
        help="number of shared experts that SGLang fuses into the routed ones (default 0)",
    )


def _journal(given: Path | None) -> Path:
    """Raises StoreError where none is given and there is no run."""
    if given is None:
        newest = next(iter(run_folder.newest_first()), None)
        if newest is None:
            raise StoreError(f"there is no run in {run_folder.root()}: name a journal, or tune first")
        given = newest
    return given / run_folder.JOURNAL if given.is_dir() else given


def _folders(arguments: argparse.Namespace, source: JournalSource) -> list[Path]:
    chosen = install_target.CHOOSERS[arguments.engine]("none", arguments.output_dir, None, source.triton)
    stored = install_target.store_folder(arguments.engine, source.triton)
    return [stored] if chosen is None else [chosen.folder, stored]


def run(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Write the table, marked as transferred, and give the document of what was written.

    Raises:
        MoEExtError: the journal is none, has nothing for that engine, or a place cannot be written.
    """
    path, adapter = _journal(arguments.journal), ENGINES[arguments.engine]
    journal = journal_reader.read(path)
    source = transfer.source_of(journal)
    theirs = ENGINES[source.engine]
    if adapter is theirs:
        raise EngineError(
            f"{path} was measured in {theirs.TITLE} itself: tune has written its tables, or --resume would"
        )
    found = transfer.best_configs(journal, source, arguments.engine)
    if not found:
        raise StoreError(f"{path} has no configuration that ran right in both GEMMs: let the run go further")
    shape = transfer.shape_in(arguments.engine, source, arguments.fused_shared_experts)
    command = shlex.join([*_COMMAND.split(), str(path), "--engine", arguments.engine])
    run_of = results_to_tables.run_of_journal(journal, source, shape, command)
    entries = results_to_tables.transferred_entries(run_of, {m: of.us for m, of in found.items()})
    table = StoredTable({m: of.config for m, of in found.items()}, Provenance(entries))
    name = install_target.table_names(adapter, shape, source.device_name)[False]
    places = [folder / name for folder in _folders(arguments, source)]
    results = merge.put(dict.fromkeys(places, table), text=lambda of: adapter.table_text(of, source.triton))
    print(f"{shape} on {source.device_name}, measured in {theirs.TITLE} {source.version}, for {adapter.TITLE}:")
    for place, result in results.items():
        print(f"kept  {place}: {result.why}" if isinstance(result, RefusedTable) else f"wrote {place}")
    return {
        "origin": "transferred",
        "entries": {m: str(of.config) for m, of in found.items()},
        "written": [str(place) for place, result in results.items() if isinstance(result, StoredTable)],
        "kept": {str(place): result.why for place, result in results.items() if isinstance(result, RefusedTable)},
    }


COMMAND = Command(
    name="export",
    summary="convert a run that measured SGLang into a table for vLLM, or the reverse",
    description=(
        "Convert the journal of a tuning run that measured one engine into a table for the other one. The table is\n"
        "marked as transferred: it is preferred to a predicted table, and a measured table is preferred to it."
    ),
    examples=(
        ("sglang-moe-ext export --engine vllm", "convert the newest run, which measured SGLang"),
        (
            "sglang-moe-ext export runs/3f2a --engine sglang --fused-shared-experts 1",
            "convert a run that measured vLLM for a model whose shared expert SGLang fuses",
        ),
    ),
    add_to=add_to,
    run=run,
)
