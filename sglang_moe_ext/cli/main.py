"""`sglang-moe-ext`: the console command, a door to each job."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from sglang_moe_ext import __version__
from sglang_moe_ext.cli import capture, doctor, export, install, overlay, patch, tune
from sglang_moe_ext.core import MoEExtError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sglang-moe-ext", description=sys.modules["sglang_moe_ext"].__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("tune", add_help=False, help="tune a layer, install the tables, prove the pick-up")
    examined = commands.add_parser("doctor", help="say what SGLang will use for a layer at each M, and why")
    doctor.add_to(examined)
    restored = commands.add_parser("install", help="put the tables of your own store into SGLang, as after an upgrade")
    install.add_to(restored)
    exported = commands.add_parser("export", help="make a table for one engine of a run that measured the other")
    export.add_to(exported)
    captured = commands.add_parser("capture", help="ask a running server how its tokens choose experts, for tune")
    capture.add_to(captured)
    overlaid = commands.add_parser("overlay", help="make a folder of tables for processes that no hook reaches")
    overlay.add_to(overlaid)
    patched = commands.add_parser("patch", help="insert our line into the engine, where no hook reaches it")
    patch.add_to(patched)
    return parser


_RUN = {
    "capture": capture.run,
    "doctor": doctor.run,
    "export": export.run,
    "install": install.run,
    "overlay": overlay.run,
    "patch": patch.run,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 an error of ours in one line, 2 usage."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["tune"]:
        return tune.main(given[1:])
    arguments = _parser().parse_args(given)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        _RUN[arguments.command](arguments)
    except MoEExtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
