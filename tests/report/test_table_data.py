"""What a table with its provenance says, and one clear line for one that is broken."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.report import table_data
from sglang_moe_ext.report.run_data import NOT_RECORDED, kernels_gains, tuned_gains
from sglang_moe_ext.tables import config_table
from tests.report.sources import GLM_H200, GLM_VLLM, HOSTILE, changed_provenance, copied, of_table


def test_a_table_has_the_figures_of_its_provenance() -> None:
    run = of_table(GLM_H200)
    document = json.loads(GLM_H200.with_name(f"{GLM_H200.stem}.provenance.json").read_text())
    for row in run.rows:
        figures = document["entries"][str(row.m)]["figures"]
        assert (row.tuned_us, row.stock_us, row.noise) == (figures["us"], figures["incumbent_us"], figures["noise"])
        assert row.gain is not None and row.gain.value == figures["gain"]
    assert len(run.rows) == len(config_table.read(GLM_H200)) == len(tuned_gains(run))


def test_our_kernels_come_from_the_file_beside_the_table() -> None:
    run = of_table(GLM_H200)
    entries = json.loads(GLM_H200.with_name(f"{GLM_H200.stem}.paths.json").read_text())["entries"]
    first = run.rows[0].kernels
    assert first is not None and first.in_graph
    assert (first.us, first.engine_us) == (entries["1"]["figures"]["us"], entries["1"]["figures"]["incumbent_us"])
    assert set(kernels_gains(run)) == {int(m) for m, entry in entries.items() if entry["path"] is not None}


def test_a_down_table_beside_it_gives_the_down_configurations() -> None:
    row = of_table(GLM_H200).rows[-1]
    down = config_table.read(GLM_H200.with_name(f"{GLM_H200.stem}_down.json"))
    assert row.down == str(down[row.m]) and row.up != row.down


def test_a_table_of_vllm_is_one_of_vllm() -> None:
    run = of_table(GLM_VLLM)
    assert (run.engine, run.files) == ("vllm", (GLM_VLLM.name,))
    assert run.environment[0][0] == "date" and run.commands


def test_a_table_without_provenance_is_a_report_without_figures(tmp_path: Path) -> None:
    bare = tmp_path / "triton_3_6_0" / GLM_H200.name
    bare.parent.mkdir()
    bare.write_bytes(GLM_H200.read_bytes())
    run = table_data.read(bare)
    assert {value for _, value in run.environment} == {NOT_RECORDED}
    assert all(row.tuned_us is None and row.origin is None and row.up for row in run.rows)
    assert any("no provenance" in note for note in run.notes)


def test_texts_of_a_stranger_are_short_and_on_one_line(tmp_path: Path) -> None:
    table = copied(GLM_H200, tmp_path)
    changed_provenance(table, model=HOSTILE * 1000, command="line\nline", driver="\x1b[31m")
    run = table_data.read(table)
    stated = dict(run.environment)
    assert len(run.name) <= 200 and run.commands == ("line\\nline",) and stated["driver"] == "\\x1b[31m"
    assert "\u202e" not in run.name


@pytest.mark.parametrize("figure", ["NaN", "Infinity", "-1", "0"])
def test_a_figure_that_is_none_is_one_line(figure: str, tmp_path: Path) -> None:
    table = copied(GLM_H200, tmp_path)
    path = table.with_name(f"{table.stem}.provenance.json")
    path.write_text(re.sub(r'"us": [0-9.]+', f'"us": {figure}', path.read_text(), count=1))
    with pytest.raises(MoEExtError, match="the figure us at M=1 is"):
        table_data.read(table)


def test_the_down_table_names_the_one_to_give() -> None:
    with pytest.raises(MoEExtError, match="without _down"):
        table_data.read(GLM_H200.with_name(f"{GLM_H200.stem}_down.json"))


def test_a_broken_provenance_is_one_line(tmp_path: Path) -> None:
    table = copied(GLM_H200, tmp_path)
    table.with_name(f"{table.stem}.provenance.json").write_text('{"format": 1')
    with pytest.raises(MoEExtError, match="not valid JSON"):
        table_data.read(table)


def test_a_name_that_is_no_tables_is_one_line(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(MoEExtError, match=r"other\.json"):
        table_data.read(other)
