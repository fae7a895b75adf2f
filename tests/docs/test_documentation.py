"""README and docs: links lead somewhere, commands parse, tables are what the code says."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import sglang_moe_ext
from sglang_moe_ext import env
from sglang_moe_ext.cli import command, main
from tests.engines import installed

REPO_ROOT = Path(sglang_moe_ext.__file__).parents[1]
PAGES = [
    REPO_ROOT / "README.md",
    REPO_ROOT / "CONTRIBUTING.md",
    *sorted((REPO_ROOT / "docs").rglob("*.md")),
    *(REPO_ROOT / folder / "README.md" for folder in ("patches", "tuned_configs", "benchmarks")),
]
README = (REPO_ROOT / "README.md").read_text(encoding="utf-8")
TROUBLESHOOTING = (REPO_ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
OURS = re.compile(r"\bsglang-moe-ext (?=[a-z])|\bpython -m sglang_moe_ext(?:\.\w+)? ")


def name_of(page: Path) -> str:
    return str(page.relative_to(REPO_ROOT))


def command_lines() -> list[tuple[str, str]]:
    """Each command of this package in an indented block, a table cell or running text, with its page."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = [line.strip() for line in text.splitlines() if line.startswith("    ")]
        cells = re.findall(r"`([^`\n]*)`", text)
        for line in dict.fromkeys((*blocks, *cells)):
            match = OURS.search(line)
            if match and "COMMAND" not in line and (line.startswith(match[0]) or re.match(r"(\w+=\S+ )+", line)):
                found.append((name_of(page), line[match.start() :].partition(" | ")[0]))
    return found


LINES = command_lines()


def test_the_pages_show_commands() -> None:
    assert len(LINES) > 40


NAMED_IN_PASSING = {
    "capture": ["--url", "URL", "--prompts", "FILE"],
    "check": ["FILE"],
    "export": ["--engine", "vllm"],
    "import": ["FILE"],
    "patch": ["--status"],
}
"""What each command needs where a sentence gives its name alone."""


def arguments_of(line: str) -> list[str]:
    """As a shell would pass them; `...` stands for a value, or for more of the same."""
    words = shlex.split(line, comments=True)
    given = words[1:] if words[0] == "sglang-moe-ext" else [*words[2].split(".")[1:], *words[3:]]
    if len(given) == 1:
        return [*given, *NAMED_IN_PASSING.get(given[0], [])]
    values = ["VALUE" if word == "..." and before.startswith("--") else word for before, word in pairwise(given)]
    return [given[0], *(word for word in values if word != "...")]


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line}"[:90] for page, line in LINES])
def test_a_command_that_a_page_shows_parses(page: str, line: str) -> None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            main.parser().parse_args(arguments_of(line))
    except SystemExit as stopped:
        assert stopped.code == 0, f"{page}: {line}\n{said.getvalue()}"


def links() -> list[tuple[str, str]]:
    return [
        (name_of(page), target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
        if not target.startswith(("http://", "https://", "#"))
    ]


@pytest.mark.parametrize(("page", "target"), links(), ids=lambda value: value)
def test_a_link_leads_to_a_file(page: str, target: str) -> None:
    file, _, anchor = target.partition("#")
    path = ((REPO_ROOT / page).parent / file).resolve()
    assert path.exists()
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
    assert not anchor or anchor in {re.sub(r"[^\w -]", "", it.lower()).replace(" ", "-") for it in headings}


def named_files() -> list[tuple[str, str]]:
    """Files that a page, or a module, names as text."""
    sources = [*PAGES, *(REPO_ROOT / "sglang_moe_ext").rglob("*.py")]
    in_repository = re.compile(r"\b((?:docs|tests|benchmarks|tools|patches|requirements)/[\w./-]+\.(?:md|py|sh|txt))\b")
    in_package = re.compile(r"`((?:cli|models|gpu|tables|kernels|engines|serving|tuning|stock)/[\w./-]+\.(?:py|json))`")
    found = []
    for source in sources:
        text = source.read_text(encoding="utf-8")
        # A module names files of upstream's repositories, too.
        is_ours = source in PAGES
        found += [(name_of(source), name) for name in in_repository.findall(text) if is_ours or name[:5] == "docs/"]
        found += [(name_of(source), f"sglang_moe_ext/{name}") for name in in_package.findall(text)]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(("source", "name"), named_files(), ids=lambda value: value)
def test_a_file_that_is_named_is_there(source: str, name: str) -> None:
    folder = (REPO_ROOT / source).parent
    assert any((place / name).exists() for place in (REPO_ROOT, folder)), f"{source} names {name}"


def rows(text: str, head: str) -> list[list[str]]:
    """The cells of the table under that head."""
    lines = text[text.index(head) :].splitlines()[2:]
    table = lines[: next((place for place, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def test_the_readme_has_no_link_that_breaks_outside_the_repository() -> None:
    assert not re.findall(r"\]\((?!https?://)[^)]*\)", README)


def test_the_table_of_commands_is_what_the_parser_says() -> None:
    expected = [[f"`sglang-moe-ext {one.name}`", one.summary] for one in main.COMMANDS]
    assert rows(README, "| command | what it does |") == expected


def test_the_table_of_exit_statuses_is_what_the_code_says() -> None:
    expected = [[str(status), meaning] for status, meaning in command.EXIT_STATUS.items()]
    assert rows(README, "| exit status | meaning |") == expected


def test_the_table_of_variables_is_what_the_code_says() -> None:
    assert rows(README, "| variable | meaning |") == [[f"`{name}`", text] for name, text in env.MEANINGS.items()]


@pytest.mark.engine
def test_the_python_example_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], cwd=REPO_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_versions_of_the_readme_are_those_that_are_tested() -> None:
    (tested,) = re.findall(r"\| tested with \| SGLang ([^;]*); vLLM ([^|]*) \|", README)
    assert tuple(tested[0].split(", ")) == installed.HOOKED_VERSIONS
    assert tuple(tested[1].strip().split(", ")) == installed.VLLM_VERSIONS


def test_every_symptom_has_a_cause_and_a_command() -> None:
    parts = TROUBLESHOOTING.split("| symptom | cause | command |")[1:]
    cells = [row for part in parts for row in rows("| symptom |" + part, "| symptom |")]
    assert len(cells) > 20
    assert all(len(row) == 3 and all(row) for row in cells)
