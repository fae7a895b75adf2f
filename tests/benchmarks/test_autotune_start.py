"""What the benchmark of the first start says of a store and of processes, where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks import autotune_start
from benchmarks.autotune_start import Start
from sglang_moe_ext import env


def test_a_file_that_was_cut_off_is_found(tmp_path: Path) -> None:
    (tmp_path / "whole.json").write_text("{}")
    (tmp_path / "cut.json").write_text('{"1": {"BLOCK')
    assert autotune_start.broken_files(tmp_path) == [tmp_path / "cut.json"]


def test_a_tuner_that_was_left_is_found_by_its_store(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print(flush=True); input()", "--for-server", "1"]
    environment = {**os.environ, env.STORE: str(tmp_path)}
    left = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    try:
        assert left.stdout is not None and left.stdout.readline()
        assert autotune_start.tuners(tmp_path) == [left.pid]
        assert autotune_start.tuners(tmp_path / "another") == []
    finally:
        left.kill()
        left.wait()
    assert autotune_start.tuners(tmp_path) == []


def test_a_predicted_table_is_not_taken_for_a_measured_one() -> None:
    line = "sglang-moe-ext: E=65: your table /store/E=65.json ({})"
    assert Start("first", 1.0, (line.format("measured"),)).is_tuned
    assert not Start("first", 1.0, (line.format("predicted"),)).is_tuned
