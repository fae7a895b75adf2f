"""Tables and progress on a terminal: through rich where it is installed, plain otherwise."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TextIO

try:
    import rich.console
    import rich.markup
    import rich.progress
    import rich.table
except ImportError:
    _rich = False
else:
    _rich = True


_SILENCE_S = 5.0
"""A log without a terminal gets a line at least this often while something moves."""


class OutputError(Exception):
    """Standard output takes no more. `why`: the system's reason, None where its reader has only stopped reading."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.why = None if isinstance(error, BrokenPipeError) else error.strerror


class CheckedOutput(io.TextIOBase):
    """A stream whose failure cannot be taken for that of another file."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str, /) -> int:
        """Raises OutputError where the stream refuses."""
        try:
            return self._stream.write(text)
        except OSError as error:
            raise OutputError(error) from error

    def flush(self) -> None:
        """Raises OutputError where the stream refuses."""
        try:
            self._stream.flush()
        except OSError as error:
            raise OutputError(error) from error

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


_bars_are_shown = True


@contextlib.contextmanager
def directed(*, is_for_programs: bool, is_quiet: bool) -> Iterator[None]:
    """Send what is printed for people to standard error where a program reads standard output, or nowhere."""
    global _bars_are_shown  # noqa: PLW0603 - as standard output itself, which is redirected for the same time
    with contextlib.ExitStack() as redirected:
        if is_quiet:
            nowhere = redirected.enter_context(open(os.devnull, "w", encoding="utf-8"))
            redirected.enter_context(contextlib.redirect_stdout(nowhere))
        elif is_for_programs:
            redirected.enter_context(contextlib.redirect_stdout(sys.stderr))
        _bars_are_shown = not is_quiet
        try:
            yield
        finally:
            _bars_are_shown = True


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of text; the columns named in `text` are set to the left, numbers to the right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: frozenset[str] = frozenset()


def show(grid: Grid) -> None:
    """Print a table to standard output."""
    if _rich and sys.stdout.isatty():
        _show_on_terminal(grid, rich.console.Console())
        return
    widths = [max(map(len, column)) for column in zip(grid.columns, *grid.rows, strict=True)]
    print(grid.title)
    for row in (grid.columns, *grid.rows):
        cells = [
            cell.ljust(width) if column in grid.text else cell.rjust(width)
            for cell, width, column in zip(row, widths, grid.columns, strict=True)
        ]
        print("  " + "  ".join(cells).rstrip())


_NARROWEST_TEXT = 12
"""Characters to which a column of text may be folded; numbers are never folded."""


def _show_on_terminal(grid: Grid, terminal: Any) -> None:
    """Print a table to a terminal, or each row below the other where its columns have no room beside each other."""
    if _least_width(grid) > terminal.width:
        _show_rows_apart(grid)
        return
    table = rich.table.Table(title=grid.title, title_justify="left")
    for column in grid.columns:
        is_text = column in grid.text
        table.add_column(column, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for row in grid.rows:
        table.add_row(*map(rich.markup.escape, row))
    terminal.print(table)


def _least_width(grid: Grid) -> int:
    """Characters that the table needs in a terminal, with three of its lines and spaces for each column."""
    widths = (
        min(needed, _NARROWEST_TEXT) if name in grid.text else needed
        for name, *cells in zip(grid.columns, *grid.rows, strict=True)
        for needed in (max(map(len, (name, *cells))),)
    )
    return sum(width + 3 for width in widths) + 1


def _show_rows_apart(grid: Grid) -> None:
    print(grid.title)
    for row in grid.rows:
        print(f"  {grid.columns[0]} {row[0]}".rstrip())
        for column, cell in zip(grid.columns[1:], row[1:], strict=True):
            if cell:
                print(f"    {column}: {cell}")


class Bar:
    """Progress of the stages of a run, on standard error, so that standard output can be read by a program."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._printed: dict[str, float] = {}
        self._live: Any = None
        self._tasks: dict[str, Any] = {}
        self._is_shown = _bars_are_shown
        if self._is_shown and _rich and sys.stderr.isatty():
            self._live = rich.progress.Progress(
                rich.progress.TextColumn("{task.description:>10}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TimeElapsedColumn(),
                rich.progress.TimeRemainingColumn(),
                console=rich.console.Console(stderr=True),
            )

    def __enter__(self) -> Bar:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, stage: str, done: int, of: int) -> None:
        """Show that so much of the stage is done. Stages may go on at the same time, each from a thread of its own."""
        if self._live is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._live.add_task(stage, total=of)
            self._live.update(self._tasks[stage], completed=done, total=of)
            return
        elapsed = time.monotonic() - self._started
        if not self._is_shown:
            return
        if stage not in self._printed or done == of or elapsed - self._printed[stage] > _SILENCE_S:
            print(f"[{elapsed:6.1f} s] {stage} {done}/{of}", file=sys.stderr, flush=True)
            self._printed[stage] = elapsed
