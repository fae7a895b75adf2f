"""`sglang-moe-ext`: one parser of all commands, which every way of calling the command line reaches."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from sglang_moe_ext import __version__, env
from sglang_moe_ext.cli import (
    bench,
    capture,
    check_tables,
    clean,
    command,
    doctor,
    e2e,
    export,
    import_tables,
    install,
    list_tables,
    overlay,
    patch,
    plan,
    report,
    tune,
)
from sglang_moe_ext.cli.command import EXIT_STATUS, PROGRAM

COMMANDS = (
    tune.COMMAND,
    plan.COMMAND,
    doctor.COMMAND,
    bench.COMMAND,
    e2e.COMMAND,
    report.COMMAND,
    list_tables.COMMAND,
    check_tables.COMMAND,
    import_tables.COMMAND,
    install.COMMAND,
    export.COMMAND,
    capture.COMMAND,
    overlay.COMMAND,
    patch.COMMAND,
    clean.COMMAND,
)
"""In the order of the help and of the README."""


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    made = argparse.ArgumentParser(
        prog=PROGRAM,
        description=sys.modules["sglang_moe_ext"].__doc__,
        epilog="exit status:\n" + "\n".join(f"  {status:<4} {meaning}" for status, meaning in EXIT_STATUS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("-V", "--version", action="version", version=f"{PROGRAM} {__version__}")
    subparsers = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for one in COMMANDS:
        command.configure(subparsers.add_parser(one.name, help=one.summary), one)
    return made


def _complete(made: argparse.ArgumentParser) -> None:
    """Answer the shell that asks for completions, and end; returns where the extra is not installed."""
    try:
        import argcomplete
    except ImportError:
        return
    argcomplete.autocomplete(made)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is its exit status, as in `command.EXIT_STATUS`."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["help"]:
        given = [*given[1:2], "--help"]
    made = parser()
    if env.COMPLETION in os.environ:
        _complete(made)
    arguments = made.parse_args(given)
    arguments.command_line = shlex.join([PROGRAM, *given])
    (chosen,) = (one for one in COMMANDS if one.name == arguments.command)
    return command.execute(chosen, arguments)
