"""The table that people see of a measured run, and the document that programs read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from sglang_moe_ext.cli import console, output
from sglang_moe_ext.core import MoEShape, TileConfig
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.tables import config_table
from sglang_moe_ext.tuning.compile.kernel_source import KernelSource
from sglang_moe_ext.tuning.pipeline import TuneOutcome
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.request import TuneRequest
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice
from sglang_moe_ext.tuning.search.statistics import Interval

OLD, NEW = TileConfig(64, 64, 32, 8, 4, 3), TileConfig(128, 256, 64, 16, 8, 4)
LONG = TileConfig(128, 256, 128, 64, 8, 4, use_tma=True)
FASTER = MeasuredChoice(
    pair={"up": NEW, "down": LONG},
    us=19_391.24,
    incumbent={"up": OLD, "down": OLD},
    incumbent_us=37_036.55,
    gain=Interval(1.912, 1.9012, 1.9183),
    noise=0.002,
    error=2.14e-3,
    tried=960,
    failures={"OutOfResources": 12},
    throttled=False,
    sm_clock_mhz=1980,
)
STAYS = replace(FASTER, pair=FASTER.incumbent, us=37_036.55, gain=Interval(1, 1, 1))
FIRST_THAT_RUNS = replace(FASTER, incumbent_us=math.inf, gain=Interval(math.inf, math.inf, math.inf), noise=None)
REQUEST = TuneRequest(
    model="GLM-4.7-Flash",
    architecture="Glm4MoeLiteForCausalLM",
    problem=Problem(MoEShape(65, 1536, 2048, 5, fused_shared=1), find_gpu("NVIDIA_H200"), "sglang"),
    vllm_shape=None,
    gpu_is_here=True,
    tokens=(16_384,),
    measuring=None,
    install="none",
    output_dir=None,
    seed=0,
    command="tune",
)


def outcome(*results: MeasuredChoice) -> TuneOutcome:
    kernel = KernelSource("sglang 0.5.23", "kernel", "0", is_engines_own=True)
    by_tokens = {16_384 - place: result for place, result in enumerate(results)}
    return TuneOutcome(
        results=by_tokens, plans={}, written=(), refused={}, destination=None, answer=None, kernel=kernel
    )


def rows(*results: MeasuredChoice) -> list[list[str]]:
    return [list(row) for row in output.results(REQUEST, outcome(*results)).rows]


def measurement(result: MeasuredChoice) -> Mapping[str, Any]:
    document = json.loads(json.dumps(output.document(REQUEST, outcome(result)), allow_nan=False))
    (found,) = document["measurements"]
    return found


def test_the_incumbent_stands_above_the_choice() -> None:
    assert [row[:3] for row in rows(FASTER)] == [
        ["16384", "before", f"both {OLD}"],
        ["", "after", f"up   {NEW}"],
        ["", "", f"down {LONG}"],
    ]


def test_the_gain_stands_with_its_interval() -> None:
    assert rows(FASTER)[1][4] == "1.91x [1.90, 1.92]"


def test_an_incumbent_that_stays_stands_once() -> None:
    assert [row[:4] for row in rows(STAYS)] == [["16384", "stays", f"both {OLD}", "37036.6"]]


def test_an_incumbent_that_cannot_run_has_no_time() -> None:
    assert [row[3] for row in rows(FIRST_THAT_RUNS)] == ["fails", "19391.2", ""]


def test_the_longest_configurations_fit_a_terminal_of_100_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    grid = output.results(REQUEST, outcome(FASTER, STAYS, FIRST_THAT_RUNS))
    console.show(grid)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("\u2502")]
    assert len(printed) == len(grid.rows)


def test_every_row_has_a_cell_for_each_column() -> None:
    grid = output.results(REQUEST, outcome(FASTER, STAYS, FIRST_THAT_RUNS))
    assert {len(row) for row in grid.rows} == {len(grid.columns)}


def test_programs_read_configurations_in_the_engines_spelling() -> None:
    found = measurement(FASTER)
    assert config_table.parse({"16384": found["up"], "1": found["down"]}) == {1: LONG, 16_384: NEW}


def test_programs_read_the_figures_of_each_m() -> None:
    found = measurement(FASTER)
    names = ("m", "us", "incumbent_us", "gain", "low", "high", "error")
    assert [found[name] for name in names] == [16_384, 19_391.24, 37_036.55, 1.912, 1.9012, 1.9183, 2.14e-3]


def test_programs_read_null_where_the_incumbent_cannot_run() -> None:
    found = measurement(FIRST_THAT_RUNS)
    assert [found[name] for name in ("incumbent_us", "gain", "low", "high", "noise")] == [None] * 5


def test_programs_read_what_was_tried_and_what_failed() -> None:
    found = measurement(FASTER)
    assert (found["tried"], found["failures"]) == (960, {"OutOfResources": 12})


def test_all_gains_are_one_line() -> None:
    found = output.gains(REQUEST, outcome(FASTER, STAYS, FIRST_THAT_RUNS))
    assert found == {16_384: 1.912, 16_383: 1}
    expected = "measured gain over today: 1.38x, the geometric mean of 2 batch sizes; most 1.91x at M=16384"
    assert output.gain_line(found, "measured") == expected


def test_where_nothing_ran_before_no_gain_is_stated() -> None:
    assert output.gain_line(output.gains(REQUEST, outcome(FIRST_THAT_RUNS)), "measured") is None


def test_the_document_says_that_it_was_measured() -> None:
    assert output.document(REQUEST, outcome(STAYS))["origin"] == "measured"
