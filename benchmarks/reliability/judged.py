"""What may come of damaged input: a result, or this package's own error in one short, printable line, soon."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from sglang_moe_ext.core import MoEExtError

LONGEST_LINE = 2_000
LONGEST_S = 5.0


@dataclass(slots=True)
class Result:
    """Of one check: how many inputs were tried, how many of them were refused, and what was wrong with which."""

    tried: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)

    def judge(self, what: str, run: Callable[[], object]) -> None:
        """Run it. A fault is any other error than ours, a line that is none, or more work than LONGEST_S."""
        self.tried += 1
        begun = time.process_time()
        try:
            run()
        except MoEExtError as error:
            self.refused += 1
            self.lines(what, [str(error)])
        except BaseException as error:  # noqa: BLE001 - that is the fault looked for
            self.faults.append(f"{what}: {type(error).__name__}: {error}"[:300])
        self.soon(what, begun)

    def lines(self, what: str, lines: Iterable[str]) -> None:
        """A fault for each that is too long, or that holds what changes a terminal or a log."""
        for line in lines:
            if len(line) > LONGEST_LINE:
                self.faults.append(f"{what}: a line of {len(line)} characters")
            if not line.isprintable():
                self.faults.append(f"{what}: not printable: {ascii(line)[:200]}")

    def soon(self, what: str, begun: float) -> None:
        """A fault where this process worked for more than LONGEST_S since `begun`, of `time.process_time`."""
        if (taken := time.process_time() - begun) > LONGEST_S:
            self.faults.append(f"{what}: took {taken:.1f} s")

    def command(self, what: str, arguments: list[str]) -> None:
        """Run a command in this process: exit status 0, 1 or 2, no traceback, and short lines."""
        from sglang_moe_ext.cli import main

        out, err = io.StringIO(), io.StringIO()
        self.tried += 1
        begun, status = time.process_time(), 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = main.main(arguments)
        except SystemExit as left:
            status = int(left.code or 0)
        except BaseException as error:  # noqa: BLE001 - that is the fault looked for
            self.faults.append(f"{what}: {type(error).__name__}: {error}"[:300])
        self.refused += status != 0
        if status not in (0, 1, 2):
            self.faults.append(f"{what}: exit status {status}")
        self.lines(what, [line for line in (out.getvalue() + err.getvalue()).split("\n") if line])
        self.soon(what, begun)
