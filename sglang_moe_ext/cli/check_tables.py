"""`sglang-moe-ext check`: whether tables in files run, and run right, on a GPU that need not be here."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from sglang_moe_ext.cli import table_files
from sglang_moe_ext.cli.command import Command


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    table_files.add_to(parser)
    parser.add_argument("--gpu", help="GPU to check for, such as RTX_5090 (default: the one in the file's name)")


def run(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Check each file, and give the document of what was found.

    Raises:
        MoEExtError: a file is no table, or its layer or GPU cannot be told.
    """
    checked = table_files.check(arguments, arguments.gpu)
    table_files.show(checked)
    return {"files": [table_files.entry(one) for one in checked]}


def _fits(document: Mapping[str, Any]) -> bool:
    return all(one["fits"] for one in document["files"])


COMMAND = Command(
    name="check",
    summary="check whether tables in files fit a GPU, without that GPU",
    description=(
        "Check whether each entry of a table of SGLang or vLLM fits the shared memory of a GPU and computes right\n"
        "results there: by the rules, and by the Triton compiler where Triton is installed. Needs no GPU. The exit\n"
        "status is 1 where an entry does not."
    ),
    examples=(
        ("sglang-moe-ext check 'E=65,N=1536,device_name=NVIDIA_H200.json'", "for the GPU in the file's name"),
        ("sglang-moe-ext check tables/E=65.json --gpu RTX_5090", "for another GPU"),
    ),
    add_to=add_to,
    run=run,
    succeeded=_fits,
)
