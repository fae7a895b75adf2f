"""What a command is, and how each one is run: the flags that all share, their streams, their exit status."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_moe_ext.cli import console
from sglang_moe_ext.core import MoEExtError

PROGRAM = "sglang-moe-ext"
DONE, FAILED, INTERRUPTED = 0, 1, 130
EXIT_STATUS: Mapping[int, str] = {
    DONE: "done",
    FAILED: "an error, in one line on standard error; or a check that found something wrong",
    2: "wrong usage: an unknown flag or a missing value",
    INTERRUPTED: "interrupted with Ctrl-C",
}
"""The exit status of every command, as the help and the README state it."""


def _stopped(_: argparse.Namespace) -> str:
    return "stopped"


def _succeeded(_: Mapping[str, Any]) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand.

    `run` prints for people and returns the document for programs; `stopped` says what an interrupt leaves behind;
    `examples` are command lines, each with what it does; `succeeded` tells from the document whether the status is 0.
    """

    name: str
    summary: str
    description: str
    examples: tuple[tuple[str, str], ...]
    add_to: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Mapping[str, Any]]
    stopped: Callable[[argparse.Namespace], str] = _stopped
    succeeded: Callable[[Mapping[str, Any]], bool] = _succeeded


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows each flag by its first name; upstream's other spellings are taken as well, and stand in docs/tuning.md."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if len(action.option_strings) < 2:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if len(name) == 2]
        names += [name for name in action.option_strings if name.startswith("--")][:1]
        if action.nargs != 0:
            names[-1] += f" {self._format_args(action, self._get_default_metavar_for_optional(action))}"
        return ", ".join(names)


def configure(parser: argparse.ArgumentParser, command: Command) -> None:
    """Give the parser the command's flags and help, and the flags that all commands share."""
    parser.description = command.description
    parser.epilog = "examples:\n" + "\n".join(f"  {line}\n      {what}" for line, what in command.examples)
    parser.formatter_class = HelpFormatter
    command.add_to(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", action="store_true", help="print one JSON document to standard output, all else to standard error"
    )
    output.add_argument("--quiet", action="store_true", help="print nothing for people but errors")


def execute(command: Command, arguments: argparse.Namespace) -> int:
    """Run the command with its flags; the result is its exit status, as in EXIT_STATUS."""
    is_verbose = getattr(arguments, "verbose", False)
    level = logging.ERROR if arguments.quiet else logging.INFO if is_verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s")
    try:
        with contextlib.redirect_stdout(console.CheckedOutput(sys.stdout)):
            status, document = _outcome(command, arguments)
            if arguments.json:
                print(json.dumps(document))
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(command.stopped(arguments), file=sys.stderr)
        return INTERRUPTED
    except console.OutputError as error:
        if error.why is not None:
            print(f"error: cannot write to standard output: {error.why}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at its end
        return FAILED
    return status


def _outcome(command: Command, arguments: argparse.Namespace) -> tuple[int, Mapping[str, Any]]:
    """The exit status, and the document: what the command found, or the error that ended it, which is also printed."""
    try:
        with console.directed(is_for_programs=arguments.json, is_quiet=arguments.quiet):
            document = command.run(arguments)
    except MoEExtError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED, {"error": str(error)}
    return DONE if command.succeeded(document) else FAILED, document
