"""Gains of a whole server stand beside their spread, and beside what stock differs from itself."""

from __future__ import annotations

import json

import pytest

from sglang_moe_ext.e2e import report
from sglang_moe_ext.e2e.measure import Cases, FirstTokens, Turn, pool, sample
from sglang_moe_ext.engines.server_log import Said

CASES = Cases((512, 1024), prompts=2, batches=(8,), runs=2, decode_input=32, decode_output=128, seed=0)
ACTIVE, ABSENT = Said(True, ("ours",), ()), Said(False, (), ())


def turns() -> list[Turn]:
    stock = Turn("stock", 60.0, {512: FirstTokens(sample([98.0, 102.0]), 9.0)}, {8: sample([1000.0, 1100.0])}, ABSENT)
    plugin = Turn("plugin", 70.0, {512: FirstTokens(sample([79.0, 81.0]), 12.0)}, {8: sample([2100.0])}, ACTIVE)
    again = Turn("stock", 60.0, {512: FirstTokens(sample([108.0, 112.0]), 8.0)}, {}, ABSENT, "it died")
    return [stock, plugin, again]


def test_a_row_has_both_kinds_the_reduction_and_the_drift_of_stock() -> None:
    known, unknown = report.prefill_rows(turns(), CASES)
    assert known == ["512", "8.50", "105.0 ± 6.2", "12.00", "80.0 ± 1.4", "+23.8 ± 7.8 %", "9.5 %"]
    assert unknown == ["1024", "-", "-", "-", "-", "-", "-"]


def test_decode_gains_where_more_tokens_come_a_second() -> None:
    (row,) = report.decode_rows(turns(), CASES)
    assert row == ["8", "1050 ± 71", "2100", "+100.0 %", "-"], "what was measured once has no spread"


def test_the_error_of_a_gain_is_that_of_a_ratio_of_means_of_few_values() -> None:
    first, second = Turn("stock", decode={8: sample([9.0, 10.0, 11.0])}), Turn("plugin", decode={8: sample([20.0] * 3)})
    found = report.compare([first, second], report.decode_of(8))
    assert found is not None
    assert found.change == 1.0
    assert found.error == pytest.approx(4.303 * 2.0 * 1.0 / 3**0.5 / 10.0), "Student's t of two degrees of freedom"


def test_samples_that_are_pooled_are_one_sample() -> None:
    together = sample([1.0, 2.0, 5.0, 9.0])
    pooled = pool([sample([1.0, 2.0]), sample([5.0, 9.0])])
    assert pooled is not None
    assert (pooled.mean, pooled.count, pooled.values) == (together.mean, 4, together.values)
    assert pooled.deviation == pytest.approx(together.deviation)


def test_a_table_for_a_pull_request_has_the_columns_of_the_rows() -> None:
    lines = report.markdown(report.PREFILL_COLUMNS, report.prefill_rows(turns(), CASES)).splitlines()
    assert lines[0].startswith("| input length | stock, requests/s | stock, mean TTFT ms | plugin, requests/s |")
    assert len({line.count("|") for line in lines}) == 1


def test_a_server_that_failed_makes_the_whole_one_that_is_not() -> None:
    document = json.loads(json.dumps(report.document(turns(), CASES)))
    assert not report.is_whole(document)
    assert report.is_whole({"servers": document["servers"][:2]})
    assert document["compared"]["ttft"]["1024"] is None
    assert "server 3 (stock): failed: it died" in report.remarks(turns())


def test_a_stock_server_with_the_plugin_is_told() -> None:
    wrong = Turn("stock", said=ACTIVE)
    assert report.remarks([wrong])[0] == "server 1 (stock): WRONG: by the log of the stock server the plugin is active"
    assert not report.is_whole(report.document([wrong], CASES))
