"""The page in a real browser: nothing comes from outside, columns sort, pictures are described."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_moe_ext.cli import main
from tests.report.browser import NAMES, Browser, find_chromium
from tests.report.sources import GLM_H200, HOSTILE, QWEN, changed_provenance, copied

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"no headless browser on PATH: none of {', '.join(NAMES)}")
COLUMN = """
[...document.querySelectorAll("table.sortable")[0].tBodies[0].rows].map(row => row.cells[{place}].textContent)
"""
CLICK = 'document.querySelectorAll("table.sortable")[0].tHead.rows[0].cells[{place}].querySelector("button").click()'
SORTED = 'document.querySelectorAll("table.sortable")[0].tHead.rows[0].cells[{place}].getAttribute("aria-sort")'


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    opened = Browser(CHROMIUM)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal, and a table whose names are hostile, on one page."""
    folder = tmp_path_factory.mktemp("report")
    table = copied(GLM_H200, folder)
    changed_provenance(table, model=HOSTILE, kernel="<img src=https://example.com/x.png onerror=alert(1)>")
    assert main.main(["report", str(QWEN), str(table), "--output-dir", str(folder), "--quiet"]) == 0
    return folder / "report.html"


@pytest.fixture
def opened(browser: Browser, report: Path) -> Browser:
    browser.events.clear()
    browser.resize(1200, 900, "light")
    browser.open(report)
    return browser


def test_the_page_asks_for_nothing_but_itself(opened: Browser, report: Path) -> None:
    assert opened.requested() == [report.resolve().as_uri()]
    assert opened.complaints() == []


def test_a_script_that_is_not_the_pages_own_does_not_run(opened: Browser, report: Path, tmp_path: Path) -> None:
    added = "<script>document.title = 'changed'</script><img src='http://127.0.0.1:9/x.png'></body>"
    changed = tmp_path / "changed.html"
    changed.write_text(report.read_text(encoding="utf-8").replace("</body>", added), encoding="utf-8")
    opened.open(changed)
    assert opened.evaluate("document.title") != "changed"
    assert any("Content Security Policy" in said for said in opened.complaints())


def test_a_column_sorts_by_its_numbers_both_ways(opened: Browser) -> None:
    place = 3  # tuned, us
    before = opened.evaluate(COLUMN.format(place=place))
    opened.evaluate(CLICK.format(place=place))
    rising = [float(text) for text in opened.evaluate(COLUMN.format(place=place))]
    assert rising == sorted(rising) and sorted(rising) == sorted(map(float, before))
    assert opened.evaluate(SORTED.format(place=place)) == "ascending"
    opened.evaluate(CLICK.format(place=place))
    falling = [float(text) for text in opened.evaluate(COLUMN.format(place=place))]
    assert falling == rising[::-1]
    opened.evaluate(CLICK.format(place=0))
    assert opened.evaluate(SORTED.format(place=place)) is None
    tokens = [int(text) for text in opened.evaluate(COLUMN.format(place=0))]
    assert tokens == sorted(tokens)


def test_a_column_of_text_sorts_with_what_is_missing_last(opened: Browser) -> None:
    texts = "[...document.querySelectorAll('table.sortable')].at(-1)"
    opened.evaluate(f"{texts}.tHead.rows[0].cells[6].querySelector('button').click()")
    cells = opened.evaluate(f"[...{texts}.tBodies[0].rows].map(row => row.cells[6].textContent)")
    known = [text for text in cells if text != "-"]
    assert known and cells == [*known, *["-"] * (len(cells) - len(known))]
    assert [float(text) for text in known] == sorted(map(float, known))


def test_every_picture_has_a_text_in_the_accessibility_tree(opened: Browser) -> None:
    nodes = opened.call("Accessibility.getFullAXTree")["nodes"]
    pictures = [
        node.get("name", {}).get("value", "") for node in nodes if node.get("role", {}).get("value") in ("image", "img")
    ]
    assert len(pictures) == opened.evaluate("document.querySelectorAll('svg').length") == 10
    assert all(len(text.split()) > 8 for text in pictures)


def test_the_page_follows_the_readers_theme(opened: Browser) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        opened.resize(1200, 900, scheme)
        paper = opened.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = opened.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
        seen[scheme] = (paper, ink)
    assert seen["light"][0] == "rgb(255, 255, 255)" and seen["light"] != seen["dark"]
    assert seen["light"][1] != seen["dark"][1]


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_the_page_is_never_wider_than_the_window(width: int, opened: Browser) -> None:
    opened.resize(width, 900, "light")
    assert opened.evaluate("document.documentElement.scrollWidth") <= width


def test_no_two_texts_of_a_figure_overlap(opened: Browser) -> None:
    overlapping = """
    [...document.querySelectorAll("svg.figure")].flatMap(svg => {
      const boxes = [...svg.querySelectorAll("text")].filter(text => !/rotate\\(-?(?!0)/.test(
        text.getAttribute("transform") || "")).map(text => [text.textContent, text.getBoundingClientRect()]);
      return boxes.flatMap(([a, one], place) => boxes.slice(place + 1).filter(([b, other]) =>
        one.left + 1 < other.right && other.left + 1 < one.right && one.top + 2 < other.bottom &&
        other.top + 2 < one.bottom).map(([b]) => a + " | " + b));
    })
    """
    assert opened.evaluate(overlapping) == []
