"""Tables on a terminal: numbers stay whole at any width."""

from __future__ import annotations

import io
import re

import pytest

from sglang_moe_ext.cli import console
from sglang_moe_ext.cli.console import Grid

GRID = Grid(
    "results",
    ("M", "today", "us", "new", "predicted us", "gain"),
    (("64", "16x128x64 G1 w4 s3", "429.6", "16x64x128 G1 w4 s4", "390.5", "1.10x"), ("128", "", "", "-", "7.0", "-")),
    text=frozenset({"today", "new"}),
)
NUMBERS = ("64", "429.6", "390.5", "1.10x")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        """What is on the screen: without the codes for colours."""
        return re.sub("\x1b\\[[0-9;]*m", "", self.getvalue())


@pytest.fixture(params=[30, 40, 57, 58, 80, 120])
def printed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(request.param))
    console.show(GRID)
    assert all(len(line) <= request.param for line in terminal.text().splitlines())
    return terminal.text()


def test_a_number_is_never_split_between_lines(printed: str) -> None:
    assert set(NUMBERS) <= set(printed.replace("\u2502", " ").split())


def test_a_narrow_terminal_gets_each_figure_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    console.show(GRID)
    assert terminal.text().splitlines()[:4] == [
        "results",
        "  M 64",
        "    today: 16x128x64 G1 w4 s3",
        "    us: 429.6",
    ]
    assert "today: \n" not in terminal.text()
