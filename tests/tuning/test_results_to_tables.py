"""What the provenance says of a measured entry: all that is known, and nothing that is not a number."""

from __future__ import annotations

import json
import math
from dataclasses import replace

from sglang_moe_ext.core import TileConfig
from sglang_moe_ext.tables import provenance
from sglang_moe_ext.tuning import results_to_tables
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice
from sglang_moe_ext.tuning.search.statistics import Interval
from tests.cli.test_output import FASTER, FIRST_THAT_RUNS, LONG, NEW, REQUEST
from tests.tables import generated

M = 64


def figures(result: MeasuredChoice, *, down: bool = False) -> dict[str, float]:
    known = results_to_tables.config_tables(REQUEST, {M: result}, generated.A_RUN)[down].provenance
    assert known is not None
    return known.entries[M].figures


def table(*, down: bool) -> dict[int, TileConfig]:
    return results_to_tables.config_tables(REQUEST, {M: FASTER}, generated.A_RUN)[down].table


def test_each_gemm_has_its_own_table() -> None:
    assert (table(down=False), table(down=True)) == ({M: NEW}, {M: LONG})


def test_a_measured_entry_says_how_long_how_much_faster_and_how_wrong() -> None:
    known = figures(FASTER)
    known.pop("floor_us")
    assert known == {
        "us": 19_391.24,
        "incumbent_us": 37_036.55,
        "gain": 1.912,
        "gain_low": 1.9012,
        "gain_high": 1.9183,
        "noise": 0.002,
        "relative_error": 0.00214,
        "sm_clock_mhz": 1980,
    }


def test_the_floor_is_below_the_time() -> None:
    known = figures(FASTER)
    assert 0 < known["floor_us"] < known["us"]


def test_of_an_incumbent_that_cannot_run_nothing_is_said() -> None:
    assert set(figures(FIRST_THAT_RUNS)) == {"us", "relative_error", "sm_clock_mhz", "floor_us"}


def test_a_clock_that_nothing_says_is_left_out() -> None:
    assert "sm_clock_mhz" not in figures(replace(FASTER, sm_clock_mhz=None))


def test_every_figure_is_finite_whatever_the_gain() -> None:
    endless = replace(FASTER, gain=Interval(2.0, 1.0, math.inf))
    assert all(map(math.isfinite, figures(endless).values()))


def test_the_figures_survive_the_disk() -> None:
    known = results_to_tables.config_tables(REQUEST, {M: FASTER}, generated.A_RUN)[True].provenance
    assert known is not None
    assert provenance.parse(json.loads(provenance.to_json(known))) == known


def test_tables_for_any_engine_lack_what_older_ones_die_of() -> None:
    """And have no entry in its place, of which nothing would have been measured."""
    with_up_tma = replace(FASTER, pair={**FASTER.pair, "up": replace(NEW, use_tma=True)})
    assert results_to_tables.for_any_engine({M: with_up_tma, 2 * M: FASTER}) == {2 * M: FASTER}


def test_tma_of_the_down_gemm_is_for_any_engine() -> None:
    with_down_tma = replace(FASTER, pair={**FASTER.pair, "down": replace(LONG, use_tma=True)})
    assert results_to_tables.for_any_engine({M: with_down_tma}) == {M: with_down_tma}
