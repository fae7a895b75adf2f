"""Two runs beside each other."""

from __future__ import annotations

from dataclasses import replace

from sglang_moe_ext.report import comparison, figures
from tests.report.sources import GLM_H100, GLM_H200, QWEN, of_journal, of_table


def test_times_are_compared_where_both_have_them() -> None:
    a, b = of_table(GLM_H200), of_table(GLM_H100)
    found = comparison.compare(a, replace(b, rows=b.rows[2:]))
    assert [row.m for row, _ in found.shared] == [row.m for row in b.rows[2:]]
    assert found.ratios[16384] == (a.rows[-1].tuned_us or 0) / (b.rows[-1].tuned_us or 1)
    assert found.warning == "the runs are of different GPUs"
    assert ("gpu", "NVIDIA H200", "NVIDIA H100 80GB HBM3") in found.differences


def test_a_run_beside_itself_differs_in_nothing() -> None:
    found = comparison.compare(of_table(GLM_H200), of_table(GLM_H200))
    assert (found.differences, found.warning, found.mean_ratio) == ((), None, 1.0)


def test_different_layers_are_said_to_be_so() -> None:
    found = comparison.compare(of_journal(QWEN), of_table(GLM_H200))
    assert found.warning is not None and "different layers" in found.warning


def test_runs_without_a_common_number_of_tokens_have_no_figure() -> None:
    a = of_table(GLM_H200)
    found = comparison.compare(a, replace(a, rows=()))
    assert (found.shared, found.mean_ratio) == ((), None)
    assert figures.draw_comparison(found.shared) is None
