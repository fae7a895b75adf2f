"""`sglang-moe-ext import`: take tables that were made elsewhere into the user's own store."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from sglang_moe_ext.cli import table_files
from sglang_moe_ext.cli.command import Command
from sglang_moe_ext.cli.table_files import CheckedFile
from sglang_moe_ext.core import TableError
from sglang_moe_ext.engines import installed_engines
from sglang_moe_ext.stock import importing
from sglang_moe_ext.stock.importing import ImportedTable


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    table_files.add_to(parser)
    parser.add_argument("--triton", help="Triton that the tables were made with, such as 3.6.0, where no file tells it")
    parser.add_argument(
        "--measured", action="store_true", help="vouch that the entries were measured on the GPU in the file's name"
    )
    parser.add_argument("--force", action="store_true", help="import tables with entries that do not fit, too")


def run(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Check the files, store them, and give the document of what was stored.

    Raises:
        MoEExtError: a file is no table, does not fit its GPU, or cannot be stored.
    """
    checked = table_files.check(arguments, None)
    table_files.show(checked)
    unfit = [one for one in checked if one.problems]
    if unfit and not arguments.force:
        raise TableError(
            f"{unfit[0].given.path} has entries that do not fit {unfit[0].gpu.device_name}: nothing was imported; "
            "--force imports it all the same, and the plugin fits such entries as a server starts"
        )
    imported = [_import(one, arguments) for one in checked]
    _show(imported)
    return {
        "files": [table_files.entry(one) for one in checked],
        "written": [str(one.place) for one in imported if one.refused is None],
        "kept": {str(one.place): one.refused for one in imported if one.refused is not None},
    }


def _import(one: CheckedFile, arguments: argparse.Namespace) -> ImportedTable:
    triton = arguments.triton or one.given.triton
    if triton is None:
        triton = installed_engines.running_triton()
        if triton is None:
            raise TableError(f"{one.given.path} does not tell which Triton it was made with: name it with --triton")
        print(f"{one.given.path} does not tell its Triton: stored for the one of this environment, {triton}")
    origin = importing.MEASURED if arguments.measured else importing.TRANSFERRED
    return importing.import_table(one.given, one.layer.shape, one.engine, triton, arguments.command_line, origin)


def _show(imported: Sequence[ImportedTable]) -> None:
    for one in imported:
        if one.refused is None:
            print(f"wrote {one.place}")
        else:
            print(f"did not import {one.source}: {one.refused}")


COMMAND = Command(
    name="import",
    summary="take tables that were made elsewhere into your own store",
    description=(
        "Take tables of SGLang or vLLM that were made elsewhere into your own store, which a server with the plugin\n"
        "reads. Each is checked first, as `check` does. Entries without provenance count less than what was measured\n"
        "here, and more than predicted ones; --measured says that they were measured on that GPU."
    ),
    examples=(
        ("sglang-moe-ext import tables/*.json", "every table in a folder"),
        (
            "sglang-moe-ext import 'E=128,N=192,device_name=NVIDIA_H200.json' --model Qwen3-30B-A3B --tp-size 4",
            "a table whose name several models ask for",
        ),
    ),
    add_to=add_to,
    run=run,
)
