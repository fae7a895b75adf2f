"""`sglang-moe-ext clean`: remove what this package wrote into the engines, and on request the user's own store."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from sglang_moe_ext.cli.command import Command
from sglang_moe_ext.stock import removal
from sglang_moe_ext.stock.removal import Leftovers


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "--store", action="store_true", help="remove your own store and the cache of the compiler as well"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be removed, and remove nothing")


def run(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Remove what was found, and give the document of it.

    Raises:
        MoEExtError: an installed engine is unknown, or a file cannot be removed.
    """
    found = removal.find(with_store=arguments.store)
    if not arguments.dry_run:
        removal.remove(found)
    _show(found, is_dry_run=arguments.dry_run)
    return {
        "dry_run": arguments.dry_run,
        "removed": [str(table.path) for table in found.tables if not table.others],
        "entries_kept": {str(table.path): sorted(table.others) for table in found.tables if table.others},
        "unfinished": [str(path) for path in found.unfinished],
        "folders": [str(path) for path in found.folders],
    }


def _show(found: Leftovers, *, is_dry_run: bool) -> None:
    verb = "would remove" if is_dry_run else "removed"
    for table in found.tables:
        if table.others:
            print(f"{verb} the entries of this package from {table.path}, and keeps {len(table.others)} others")
        else:
            print(f"{verb} {table.path}")
    for path in (*found.unfinished, *found.folders):
        print(f"{verb} {path}")
    if not (found.tables or found.unfinished or found.folders):
        print("nothing to remove: no engine that is installed here has a table of this package")


COMMAND = Command(
    name="clean",
    summary="remove what this package wrote into SGLang and vLLM; with --store, your own tables as well",
    description=(
        "Remove every table that this package wrote into the SGLang and vLLM of this environment, which are found by\n"
        "their .provenance.json, and its overlay. Run it before `pip uninstall sglang-moe-ext`."
    ),
    examples=(
        ("sglang-moe-ext clean --dry-run", "print what would be removed"),
        ("sglang-moe-ext clean", "remove it; your own store stays"),
        ("sglang-moe-ext clean --store", "remove your own store and the cache of the compiler as well"),
    ),
    add_to=add_to,
    run=run,
)
