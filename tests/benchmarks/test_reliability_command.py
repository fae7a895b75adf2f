"""`python -m benchmarks.reliability`: a few inputs of the checks that need no engine, and a fault that must be told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.reliability.judged import LONGEST_LINE, Result
from sglang_moe_ext.core import TableError
from tests.engines.installed import REPO_ROOT


def test_the_table_has_a_row_for_each_check_and_no_fault(tmp_path: Path) -> None:
    out = tmp_path / "reliability.md"
    command = [sys.executable, "-m", "benchmarks.reliability", "commands", "journals", "readers", "--count", "8"]
    done = subprocess.run([*command, "--out", str(out)], cwd=REPO_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in out.read_text().splitlines() if line.startswith("|")][2:]
    assert [(tried, faults) for _, tried, _, faults, _ in rows] == [("8", "0")] * 3


def raise_value_error() -> None:
    raise ValueError("not ours")


def raise_long_line() -> None:
    raise TableError("x" * (LONGEST_LINE + 1))


def raise_colours() -> None:
    raise TableError("\x1b[31m")


@pytest.mark.parametrize("run", [raise_value_error, raise_long_line, raise_colours])
def test_what_is_no_short_error_of_ours_is_a_fault(run: object) -> None:
    result = Result()
    result.judge("it", run)  # type: ignore[arg-type]
    assert len(result.faults) == 1
