"""`sglang-moe-ext report`: a page with figures of a tuning run, or of tables, and the text of a pull request."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_moe_ext.cli import console
from sglang_moe_ext.cli.command import Command
from sglang_moe_ext.core import MoEExtError, StoreError
from sglang_moe_ext.report import comparison, document, drawing, figures, journal_data, page, pull_request, table_data
from sglang_moe_ext.report.comparison import RunComparison
from sglang_moe_ext.report.drawing import DrawnFigure
from sglang_moe_ext.report.page import Section
from sglang_moe_ext.report.run_data import ReportedRun, kernels_gains, mean_gain, tuned_gains
from sglang_moe_ext.tables import files
from sglang_moe_ext.untrusted import show

FOLDER = Path("sglang-moe-ext-report")
PAGE, DOCUMENT, PULL_REQUEST = "report.html", "report.json", "pull_request.md"
MOST_SOURCES = 24
_COLUMNS = ("source", "layer", "GPU", "tokens", "tuned over stock", "our kernels over tuned")


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "sources",
        nargs="*",
        type=Path,
        metavar="RUN|TABLE",
        help="a run's folder, its journal (.jsonl, .jsonl.gz) or a table (default: the newest run of your store)",
    )
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("RUN_A", "RUN_B"), help="two runs or tables beside each other"
    )
    parser.add_argument(
        "--output-dir", type=Path, default=FOLDER, metavar="FOLDER", help=f"where to write (default ./{FOLDER})"
    )


def run(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Write the report, and give its document.

    Raises:
        MoEExtError: the extra is not installed, a source cannot be read, or the folder cannot be written.
    """
    sources = _sources(arguments)
    drawing.require_extra()
    folder: Path = arguments.output_dir
    if not files.is_writable(folder):
        raise StoreError(f"cannot write {show(str(folder))}: choose another --output-dir")
    with console.Bar() as bar:
        runs = [_read(source, place, len(sources), bar) for place, source in enumerate(sources)]
        compared = comparison.compare(*runs) if arguments.compare else None
        sections = [_section(one, place, len(runs), arguments, bar) for place, one in enumerate(runs)]
        between = None if compared is None else figures.draw_comparison(compared.shared)
        found = _document(runs, compared)
        written = _write(folder, sections, compared, between, found)
        bar("write", len(written), len(written))
    _print(runs, compared)
    print(f"wrote {folder / PAGE}, {folder / PULL_REQUEST}, {folder / DOCUMENT} and {len(written) - 3} pictures")
    return {**found, "written": [str(path) for path in written]}


def _sources(arguments: argparse.Namespace) -> list[Path]:
    """Raises MoEExtError where both ways to name them are used, or too many are named."""
    if arguments.compare and arguments.sources:
        raise MoEExtError("--compare takes its two runs: leave the others out, or leave --compare out")
    if len(arguments.sources) > MOST_SOURCES:
        raise MoEExtError(f"{len(arguments.sources)} runs and tables: one page takes no more than {MOST_SOURCES}")
    return list(arguments.compare or arguments.sources or [journal_data.newest_run()])


def _read(source: Path, place: int, count: int, bar: console.Bar) -> ReportedRun:
    if journal_data.is_run(source):
        return journal_data.read(source, lambda done, of: bar("read", place * of + done, count * of))
    if table_data.is_table(source):
        found = table_data.read(source)
        bar("read", place + 1, count)
        return found
    raise StoreError(f"{show(str(source))} is no run and no table: expected a folder, .jsonl, .jsonl.gz or .json")


def _section(of: ReportedRun, place: int, count: int, arguments: argparse.Namespace, bar: console.Bar) -> Section:
    letter = "AB"[place] if arguments.compare else str(place + 1)
    prefix = "" if count == 1 else f"{letter.lower()}-"
    drawn = figures.draw_all(of, prefix, lambda done, total: bar("draw", place * total + done, count * total))
    heading = of.name if count == 1 else f"{letter}: {of.name}"
    return Section(of, heading, drawn, pull_request.write(of))


def _document(runs: Sequence[ReportedRun], compared: RunComparison | None) -> dict[str, Any]:
    return {
        "format": document.FORMAT,
        "reports": [document.document(one) for one in runs],
        "comparison": None if compared is None else comparison.document(compared),
    }


def _write(
    folder: Path,
    sections: Sequence[Section],
    compared: RunComparison | None,
    between: DrawnFigure | None,
    found: Mapping[str, Any],
) -> list[Path]:
    texts = {
        folder / PAGE: page.render(sections, None if compared is None else (compared, between)),
        folder / PULL_REQUEST: "\n---\n\n".join(section.pull_request for section in sections),
        folder / DOCUMENT: json.dumps(found, indent=1) + "\n",
    }
    files.write_together(texts)
    drawn = [*([] if between is None else [between]), *(one for section in sections for one in section.figures)]
    pictures = {folder / f"{figure.name}.png": figure.png for figure in drawn}
    for path, png in pictures.items():
        _write_picture(path, png)
    return [*texts, *pictures]


def _write_picture(path: Path, png: bytes) -> None:
    try:
        path.write_bytes(png)
    except OSError as error:
        raise StoreError(f"cannot write {show(str(path))}: {error.strerror}; choose another --output-dir") from error


def _print(runs: Sequence[ReportedRun], compared: RunComparison | None) -> None:
    rows = [
        [
            one.source,
            one.name,
            one.device_name,
            str(len(one.rows)),
            _gain(list(tuned_gains(one).values())),
            _gain(list(kernels_gains(one).values())),
        ]
        for one in runs
    ]
    console.show(console.Grid("geometric means", _COLUMNS, rows, frozenset(_COLUMNS[:3])))
    for one in runs:
        for note in one.notes:
            print(f"note: {one.source}: {note}")
    if compared is not None:
        if compared.warning:
            print(f"note: {compared.warning}")
        if compared.mean_ratio is not None:
            print(f"A over B: {compared.mean_ratio:.3f}, geometric mean of {len(compared.ratios)} numbers of tokens")


def _gain(gains: list[float]) -> str:
    mean = mean_gain(gains)
    return "not recorded" if mean is None else f"{mean:.3f}x of {len(gains)}"


COMMAND = Command(
    name="report",
    summary="draw a run or a table: one page with figures, and the text of a pull request",
    description=(
        "Draw a tuning run, or tables: time and gain over the number of tokens, the search space, the predicted\n"
        "order, errors, clocks and noise, the environment. Writes one HTML page that loads nothing, a PNG of each\n"
        "figure, a JSON document, and the text of a pull request to SGLang or vLLM. Nothing in it is random."
    ),
    examples=(
        ("sglang-moe-ext report", "the newest run of your store"),
        ("sglang-moe-ext report RUN_FOLDER --output-dir page", "a run by its folder or its journal"),
        ("sglang-moe-ext report --compare BEFORE.jsonl AFTER.jsonl", "two runs beside each other"),
    ),
    add_to=add_to,
    run=run,
)
