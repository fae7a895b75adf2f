"""The page and its figures: self-contained, the same each time, and safe against names of strangers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from sglang_moe_ext.report import drawing, figures, page, pull_request, table_data
from sglang_moe_ext.report.page import Section
from sglang_moe_ext.report.run_data import ReportedRun
from tests.report.sources import GLM_H200, HOSTILE, QWEN, changed_provenance, copied, of_journal, of_table


def section_of(run: ReportedRun, prefix: str = "") -> Section:
    drawn = figures.draw_all(run, prefix, lambda done, of: None)
    return Section(run, run.name, drawn, pull_request.write(run))


@pytest.fixture(scope="module")
def of_qwen() -> Section:
    return section_of(of_journal(QWEN))


class Elements(HTMLParser):
    """Every element with its attributes, and the text outside of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_a_journal_has_every_figure_and_a_table_all_but_two(of_qwen: Section) -> None:
    assert [figure.name for figure in of_qwen.figures] == list(figures.FIGURES)
    drawn = figures.draw_all(of_table(GLM_H200), "", lambda done, of: None)
    assert [figure.name for figure in drawn] == ["gain", "time", "error", "machine"]


def test_a_page_loads_nothing(of_qwen: Section) -> None:
    elements = Elements(page.render([of_qwen], None)).found
    policy = next(of["content"] for tag, of in elements if of.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none';")
    assert not {tag for tag, _ in elements} & {"img", "link", "iframe", "object", "embed", "audio", "video", "image"}
    for tag, attributes in elements:
        assert "src" not in attributes, tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("href", "xlink:href") or (value or "").startswith("#"), (tag, value)
            assert "url(" not in (value or "") or "url(#" in (value or ""), (tag, value)


def test_every_picture_says_in_words_what_it_shows(of_qwen: Section) -> None:
    labels = [of.get("aria-label") for tag, of in Elements(page.render([of_qwen], None)).found if tag == "svg"]
    assert labels == [figure.alt for figure in of_qwen.figures]
    assert all(label and len(label.split()) > 8 and any(map(str.isdigit, label)) for label in labels)


def test_ids_are_unique_on_a_page_of_two_runs(of_qwen: Section) -> None:
    other = section_of(of_table(GLM_H200), "b-")
    ids = re.findall(r'\bid="([^"]+)"', page.render([of_qwen, other], None))
    assert len(ids) == len(set(ids)) > 100


def test_a_page_and_its_pictures_are_the_same_each_time(of_qwen: Section) -> None:
    again = section_of(of_journal(QWEN))
    assert [figure.png for figure in again.figures] == [figure.png for figure in of_qwen.figures]
    assert page.render([again], None) == page.render([of_qwen], None)


def test_pictures_are_small(of_qwen: Section) -> None:
    assert sum(len(figure.png) for figure in of_qwen.figures) < 300_000
    assert all(figure.png.startswith(b"\x89PNG") for figure in of_qwen.figures)


def test_figures_take_their_colours_from_the_page(of_qwen: Section) -> None:
    for figure in of_qwen.figures:
        assert "var(--ink)" in figure.svg and "var(--grid)" in figure.svg
        assert not re.findall(r"#[0-9a-f]{6}\b", figure.svg), figure.name


def luminance(colour: str) -> float:
    def linear(part: float) -> float:
        return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(int(colour[place : place + 2], 16) / 255) for place in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_their_paper(theme: int) -> None:
    of = {name: colours[theme] for name, colours in drawing.THEME.items()}
    for ground in ("paper", "panel"):
        assert contrast(of["ink"], of[ground]) >= 7
        assert contrast(of["muted"], of[ground]) >= 4.5
    assert all(contrast(of[name], of["paper"]) >= 3 for name in ("stock", "tuned", "kernels", "other"))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_the_map_changes_steadily_in_lightness_and_the_fastest_stand_out_most(theme: int) -> None:
    paper = drawing.THEME["paper"][theme]
    found = [contrast(drawing.THEME[name][theme], paper) for name in drawing.HEAT]
    assert found == sorted(found, reverse=True)
    assert all(one / other > 1.3 for one, other in pairwise(found))


def test_a_strangers_name_is_text_on_the_page(tmp_path: Path) -> None:
    table = copied(GLM_H200, tmp_path)
    changed_provenance(table, model=HOSTILE, command=HOSTILE, gpu='"><img src=x onerror=alert(1)>')
    elements = Elements(page.render([section_of(table_data.read(table))], None)).found
    assert [tag for tag, _ in elements].count("script") == 1
    assert "img" not in {tag for tag, _ in elements}
    assert not [of for _, of in elements if any(name.startswith("on") for name in of)]


def test_a_run_without_any_figure_is_still_a_page() -> None:
    run = replace(of_journal(QWEN), rows=(), space=None, regret=())
    section = section_of(run)
    assert section.figures == [] and "not recorded" in page.render([section], None)


def test_a_predicted_table_has_its_times_and_no_gain(tmp_path: Path) -> None:
    table = copied(GLM_H200, tmp_path)
    table.with_name(f"{table.stem}.paths.json").unlink()
    path = table.with_name(f"{table.stem}.provenance.json")
    document = json.loads(path.read_text())
    for entry in document["entries"].values():
        entry |= {"origin": "predicted", "figures": {"predicted_us": 9.5, "floor_us": 8.0, "gain_predicted": 1.5}}
    path.write_text(json.dumps(document))
    section = section_of(table_data.read(table))
    assert [figure.name for figure in section.figures] == ["time"]
    assert "Predicted: 9.5 us at M=1" in section.figures[0].alt
    assert "20 of 20 entries were NOT measured" in section.pull_request
    assert "1.5" not in pull_request.table(section.run)


@pytest.mark.parametrize("tokens", [(3,), (1, 2**31 - 1), (5, 6, 7), (1000, 1001)], ids=str)
def test_any_numbers_of_tokens_can_be_drawn(tokens: tuple[int, ...]) -> None:
    run = of_table(GLM_H200)
    rows = tuple(replace(run.rows[0], m=m) for m in tokens)
    names = [figure.name for figure in section_of(replace(run, rows=rows)).figures]
    assert names == ["gain", "time", "error", "machine"]
