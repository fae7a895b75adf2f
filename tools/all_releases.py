"""Run the contract tests against the releases that `./check` does not hold, one after the other.

usage, from the project's folder: python -m tools.all_releases sglang|vllm [RELEASE ...] [--again]

Without a RELEASE, all on the package index between the first and the last that are supported. Each is unpacked into a
temporary folder, its tests run in the project's environment, and its row is written to docs/tested-releases.md at
once; a release that has a row is left out, unless --again. A new release is one command: it names the tests that fail.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

from sglang_moe_ext.engines.installed_engines import parse_version
from tests.engines.installed import HOOKED_VERSIONS, VLLM_VERSIONS
from tools import unpack_vllm

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "tested-releases.md"
HELD = {"sglang": HOOKED_VERSIONS, "vllm": VLLM_VERSIONS}
TESTS = {
    "sglang": (
        "test_engine_answers.py test_runner_every_scheme.py test_launch_rules.py sglang/test_engine_contract.py "
        "sglang/test_hooks_in_real_engine.py sglang/test_layer_binaries.py sglang/test_lookup_probe.py "
        "sglang/test_routing_hook.py sglang/test_shared_expert_fusion.py sglang/test_sorted_layer_in_real_engine.py"
    ),
    "vllm": (
        "test_engine_answers.py test_launch_rules.py vllm/test_guard_formula.py vllm/test_hooks_in_real_engine.py "
        "vllm/test_lookup_probe.py vllm/test_runner.py"
    ),
}
FIRST = {"sglang": (0, 5, 5), "vllm": (0, 20, 0)}
LIMIT_S = 1200
MOST_NAMES = 5
HEAD = """\
# Releases that are tested

`./check` holds SGLang {sglang} and vLLM {vllm}. The
releases between them were tested with `python -m tools.all_releases sglang` and `... vllm`, without a
GPU: each release's own Python, unpacked from its wheel, in the environment of `./check` (the torch and
Triton of `requirements/engine.txt`). The tests are those of `tests/engines` that ask a release: its
names and signatures, the lookup and its answers, the hooks, the guard, the binaries of its kernel, and
our layers in Triton's interpreter where the release can run them.

Releases without a row were not run yet. What failed, and what it means:

- SGLang 0.5.14: two tests ask for fused shared experts, and cannot publish that release's flags, which
  lie elsewhere.
- SGLang 0.5.19: it runs compressed-tensors of 4 bits on a B200 by Triton, where our rule says Marlin. A
  server of it is asked, so that `doctor` and `tune` say so; without the engine the rule is printed as
  a guess.
- vLLM 0.23, 0.24, 0.27 and 0.28: the engine gives no answer for compressed-tensors of 8 bits in groups,
  so that the rule is printed as a guess. 0.28.0 refuses such a checkpoint itself, by an assertion; the
  others were not looked into.

| engine | release | tests that passed | failed | skipped | which failed | Triton | date |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Row:
    """What the tests of one release came to; `failed` are their functions."""

    engine: str
    release: str
    passed: int
    failed: tuple[str, ...]
    skipped: int
    triton: str
    date: str

    def line(self) -> str:
        """The row of the document's table."""
        which = (
            ", ".join(f"`{name}` ({count})" for name, count in Counter(self.failed).most_common(MOST_NAMES)) or "none"
        )
        cells = self.engine, self.release, self.passed, len(self.failed), self.skipped, which, self.triton, self.date
        return f"| {' | '.join(map(str, cells))} |"


def releases(engine: str) -> list[str]:
    """All on the package index within the supported range that `./check` does not hold, oldest first."""
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", engine], capture_output=True, text=True, check=True
    )
    (listed,) = re.findall(r"^Available versions: (.*)$", asked.stdout, re.MULTILINE)
    last = parse_version(HELD[engine][-1])
    supported = [it for it in listed.split(", ") if FIRST[engine] <= parse_version(it) <= last]
    return [it for it in reversed(supported) if it not in HELD[engine]]


def unpack(engine: str, release: str, folder: Path) -> None:
    """Of SGLang the whole wheel; of vLLM its Python alone."""
    pip = [sys.executable, "-m", "pip", "-q"]
    if engine == "sglang":
        into = ["--no-compile", "--target", str(folder / engine / release)]
        subprocess.run([*pip, "install", "--no-deps", *into, f"sglang=={release}"], check=True)
        return
    tags = ["manylinux1", "manylinux2014", *(f"manylinux_2_{minor}" for minor in range(17, 40))]
    wheels = ["--only-binary=:all:", *(word for tag in tags for word in ("--platform", f"{tag}_x86_64"))]
    subprocess.run([*pip, "download", "--no-deps", *wheels, "-d", str(folder), f"vllm=={release}"], check=True)
    (wheel,) = folder.glob("vllm-*.whl")
    unpack_vllm.unpack(wheel, folder / engine / release)
    wheel.unlink()


def test(engine: str, release: str) -> Row:
    """Unpack that release, and run what asks it."""
    with tempfile.TemporaryDirectory(prefix="releases_") as name:
        folder = Path(name)
        unpack(engine, release, folder)
        report = folder / "report.xml"
        variables = {"SGLANG_MOE_EXT_ENGINES": name, f"SGLANG_MOE_EXT_TEST_{engine.upper()}": release}
        paths = [f"tests/engines/{path}" for path in TESTS[engine].split()]
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}", "-k", release, *paths],
            cwd=ROOT, env={**os.environ, **variables}, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        return read_report(engine, release, report)


def read_report(engine: str, release: str, report: Path) -> Row:
    """Counts and names of pytest's own report. Raises FileNotFoundError where it did not come to write one."""
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    count = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    failed = tuple(
        str(case.get("name")).partition("[")[0]
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    )
    passed = count["tests"] - count["failures"] - count["errors"] - count["skipped"]
    today = datetime.date.today().isoformat()
    return Row(engine, release, passed, failed, count["skipped"], metadata.version("triton"), today)


def write(row: Row) -> None:
    """The document with that row, among those that are there, in the order of engines and releases."""
    lines = rows_so_far() | {(row.engine, row.release): row.line()}
    ordered = sorted(lines, key=lambda it: (it[0], parse_version(it[1]), it[1]))
    head = HEAD.format(sglang=", ".join(HELD["sglang"]), vllm=", ".join(HELD["vllm"]))
    DOCUMENT.write_text(head + "".join(f"{lines[key]}\n" for key in ordered), encoding="utf-8")


def rows_so_far() -> dict[tuple[str, str], str]:
    """Lines of the document's table by engine and release."""
    text = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    rows = re.finditer(r"^\| (sglang|vllm) \| (\S+) \|.*$", text, re.MULTILINE)
    return {(row[1], row[2]): row[0] for row in rows}


def main() -> int:
    """1 where a test failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", choices=tuple(HELD))
    parser.add_argument("releases", nargs="*", metavar="RELEASE")
    parser.add_argument("--again", action="store_true", help="releases that have a row as well")
    arguments = parser.parse_args()
    known = rows_so_far()
    asked = [
        it
        for it in arguments.releases or releases(arguments.engine)
        if arguments.again or (arguments.engine, it) not in known
    ]
    print(f"{arguments.engine}: {', '.join(asked) or 'all have a row'}", flush=True)
    failed = 0
    for release in asked:
        row = test(arguments.engine, release)
        write(row)
        failed += len(row.failed)
        print(row.line(), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
