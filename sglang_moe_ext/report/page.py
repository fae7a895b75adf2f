"""One HTML page that loads nothing: figures, tables and the script that sorts them are in it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext import __version__
from sglang_moe_ext.report import drawing
from sglang_moe_ext.report.comparison import RunComparison
from sglang_moe_ext.report.drawing import DrawnFigure
from sglang_moe_ext.report.run_data import (
    NOT_RECORDED,
    ReportedRun,
    TokensRow,
    kernels_gains,
    mean_gain,
    tuned_gains,
)
from sglang_moe_ext.tuning.search.statistics import Interval

_TEMPLATE = Path(__file__).with_name("page.html")
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table; `key` is what it is sorted by, empty behind all others."""

    text: str
    key: str


@dataclass(frozen=True, slots=True)
class PageTable:
    """A table of the page. `text`: columns that hold no numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    text: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Section:
    """One run or table on the page."""

    run: ReportedRun
    heading: str
    figures: Sequence[DrawnFigure]
    pull_request: str


def render(sections: Sequence[Section], compared: tuple[RunComparison, DrawnFigure | None] | None) -> str:
    """The whole page. It depends on its arguments alone."""
    import jinja2
    from markupsafe import Markup

    source = _TEMPLATE.read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(source)
    script = _SCRIPT.search(source)
    digest = hashlib.sha256(script[1].encode() if script else b"").digest()
    return template.render(
        script_hash=base64.b64encode(digest).decode(),
        light=Markup("".join(f"--{name}: {light};" for name, (light, _) in drawing.THEME.items())),
        dark=Markup("".join(f"--{name}: {dark};" for name, (_, dark) in drawing.THEME.items())),
        version=__version__,
        title=" and ".join(dict.fromkeys(section.run.name for section in sections)),
        compared=None if compared is None else _compared(*compared),
        sections=[_section(section, Markup) for section in sections],
    )


def _section(section: Section, markup: type[str]) -> dict[str, object]:
    run = section.run
    tables = [_entries(run), *([_regret(run)] if run.regret else []), *([_space(run)] if run.space else [])]
    return {
        "heading": section.heading,
        "run": run,
        "summary": list(_summary(run)),
        "figures": [(one, markup(one.svg)) for one in section.figures],
        "tables": tables,
        "pull_request": section.pull_request,
        "commands": run.commands or (NOT_RECORDED,),
    }


def _summary(run: ReportedRun) -> Iterator[tuple[str, str]]:
    tuned, ours = tuned_gains(run), kernels_gains(run)
    yield "tuned over stock", _mean(tuned)
    yield "our kernels over the tuned engine", _mean(ours)
    errors = [row.error for row in run.rows if row.error is not None]
    yield "largest error", f"{max(errors):.1e}" if errors else NOT_RECORDED
    yield "numbers of tokens", str(len(run.rows))


def _mean(gains: dict[int, float]) -> str:
    mean = mean_gain(list(gains.values()))
    return NOT_RECORDED if mean is None else f"{mean:.2f}x, mean of {len(gains)}"


def _compared(found: RunComparison, figure: DrawnFigure | None) -> dict[str, object]:
    from markupsafe import Markup

    rows = tuple(
        (_number(a.m, "d"), _number(a.tuned_us, ".1f"), _number(b.tuned_us, ".1f"), _number(ratio, ".3f"))
        for a, b in found.shared
        for ratio in (found.ratios.get(a.m),)
    )
    return {
        "warning": found.warning,
        "figure": None if figure is None else (figure, Markup(figure.svg)),
        "table": PageTable("Times of both", ("M", "A, us", "B, us", "A over B"), rows),
        "differences": PageTable(
            "What differs",
            ("name", "A", "B"),
            tuple((_text(name), _text(a), _text(b)) for name, a, b in found.differences),
            frozenset(("name", "A", "B")),
        ),
    }


_ENTRY_COLUMNS = (
    "M", "origin", "stock, us", "tuned, us", "gain", "95 %", "our kernels, us", "engine beside them, us",
    "their gain", "roofline, us", "of it", "error", "noise, %", "MHz", "up", "down", "our kernels",
)  # fmt: skip
_ENTRY_TEXT = frozenset(("origin", "95 %", "up", "down", "our kernels"))


def _entries(run: ReportedRun) -> PageTable:
    return PageTable("Every number of tokens", _ENTRY_COLUMNS, tuple(map(_entry, run.rows)), _ENTRY_TEXT)


def _entry(row: TokensRow) -> tuple[Cell, ...]:
    ours = row.kernels
    tuned_us = row.predicted_us if row.tuned_us is None else row.tuned_us
    reached = None if row.floor_us is None or tuned_us is None else row.floor_us / tuned_us
    plan = None if ours is None else ours.plan or "none was faster, or none was tried"
    return (
        _number(row.m, "d"),
        _text(row.origin),
        _number(row.stock_us, ".1f"),
        _number(tuned_us, ".1f"),
        _number(None if row.gain is None else row.gain.value, ".3f"),
        _interval(row.gain),
        _number(None if ours is None else ours.us, ".1f"),
        _number(None if ours is None else ours.engine_us, ".1f"),
        _number(None if ours is None or ours.gain is None else ours.gain.value, ".3f"),
        _number(row.floor_us, ".1f"),
        _number(reached, ".0%"),
        _number(row.error, ".1e"),
        _number(None if row.noise is None else 100 * row.noise, ".2f"),
        _number(row.clock_mhz, ".0f"),
        _text(row.up),
        _text(row.down),
        _text(plan),
    )


def _regret(run: ReportedRun) -> PageTable:
    rows = tuple(
        (
            _number(row.m, "d"),
            _number(len(row.curve), "d"),
            *(_number(100 * row.after(count), ".2f") for count in (1, 8, 24)),
        )
        for row in run.regret
    )
    columns = ("M", "timed", "first, %", "best of 8, %", "best of 24, %")
    return PageTable("Regret of the predicted order", columns, rows)


def _space(run: ReportedRun) -> PageTable:
    space = run.space
    assert space is not None
    rows = (
        *((_text(rule), _number(count, "d"), _text(space.why.get(rule))) for rule, count in space.dropped.items()),
        (_text("kept"), _number(space.kept, "d"), _text(f"{space.timed} binaries of them timed")),
        (_text("timed with TMA"), _number(space.with_tma, "d"), _text("binaries, beside those of the map")),
    )
    return PageTable("What each rule dropped", ("rule", "configurations", "why"), rows, frozenset(("rule", "why")))


def _number(value: float | None, form: str) -> Cell:
    return Cell("-", "") if value is None else Cell(format(value, form), repr(float(value)))


def _interval(gain: Interval | None) -> Cell:
    return Cell("-", "") if gain is None else Cell(f"{gain.low:.3f} to {gain.high:.3f}", repr(gain.low))


def _text(text: str | None) -> Cell:
    return Cell("-", "") if text is None else Cell(text, text)
