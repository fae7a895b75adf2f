"""Flags by which a starting server runs `tune`, and when there is nothing to do for it; users have no use for them."""

from __future__ import annotations

import argparse
import os

from sglang_moe_ext.engines import installed_engines
from sglang_moe_ext.engines.end_with_parent import end_with_parent
from sglang_moe_ext.tuning import install_target, known_tables
from sglang_moe_ext.tuning.request import TuneRequest


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the flags, which no help shows."""
    parser.add_argument("--for-server", type=int, metavar="PID", help=argparse.SUPPRESS)
    parser.add_argument("--served-by-triton", action="store_true", help=argparse.SUPPRESS)


def begin(arguments: argparse.Namespace) -> None:
    """End with the server that waits for this run, whose process group is its own."""
    if arguments.for_server is not None and os.getpgrp() == os.getpid():
        end_with_parent(arguments.for_server)


def why_needless(arguments: argparse.Namespace, request: TuneRequest) -> str | None:
    """Why a server that waits gains nothing by this run; None where it may, or where no server waits.

    A table of another Triton is one that the server reads until there is one of its own, which this run makes.
    """
    if arguments.for_server is None:
        return None
    if not arguments.served_by_triton:
        note = request.adapter.why_no_table(request.shape, request.gpu, request.architecture)
        if note is not None:
            return note
    triton = installed_engines.running_triton() or ""
    folder = install_target.store_folder(request.engine, triton).name
    known = known_tables.find_measured(request.problem)
    if known is None or known[1].parent.name != folder:
        return None
    return f"a measured table for this layer is {known[0]}, {known[1]}"
