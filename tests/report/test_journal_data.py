"""What a journal says, and what it does not: a report agrees with the run, and a damaged journal is one clear line."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.report import journal_data
from sglang_moe_ext.report.run_data import NOT_RECORDED, mean_gain, tuned_gains
from sglang_moe_ext.tuning.run.journal import Journal
from tests.report.sources import GLM, GLM_H200, GLM_OWN_KERNELS, QWEN, of_journal, of_table
from tests.tuning import recorded_runs


def lines_of(path: Path) -> list[bytes]:
    return gzip.decompress(path.read_bytes()).splitlines(keepends=True)


def test_a_report_says_what_the_run_chose(tmp_path: Path) -> None:
    again = Journal.create(tmp_path / "journal.jsonl", {})
    station = recorded_runs.ReplayingStation(recorded_runs.replayed("qwen3_30b_a3b_fp8_block"))
    chosen = recorded_runs.measured("qwen3_30b_a3b_fp8_block", again, [station], tokens=(1, 64, 4096))
    rows = {row.m: row for row in of_journal(QWEN).rows}
    for m, choice in chosen.items():
        assert (rows[m].up, rows[m].down) == (str(choice.pair["up"]), str(choice.pair["down"]))
        assert (rows[m].tuned_us, rows[m].gain, rows[m].error) == (choice.us, choice.gain, choice.error)


def test_every_number_of_tokens_of_a_recorded_run_has_its_figures() -> None:
    run = of_journal(QWEN)
    assert [row.m for row in run.rows][:3] == [1, 2, 4] and len(run.rows) == 20
    for row in run.rows:
        assert row.gain is not None and row.gain.low <= row.gain.value <= row.gain.high
        assert row.tuned_us and row.stock_us and row.floor_us and row.error and row.clock_mhz
    assert mean_gain(list(tuned_gains(run).values())) == pytest.approx(1.0247, abs=1e-3)


def test_what_a_journal_does_not_hold_is_not_recorded() -> None:
    stated = dict(of_journal(GLM).environment)
    assert {stated[name] for name in ("date", "command", "model")} == {NOT_RECORDED}
    assert stated["driver"] == "580.159.04"
    assert of_journal(GLM).rows[0].kernels is None


def test_a_run_and_the_table_that_came_of_it_say_the_same_of_our_kernels() -> None:
    run, table = ({row.m: row for row in it.rows} for it in (of_journal(GLM_OWN_KERNELS), of_table(GLM_H200)))
    won = [m for m, row in table.items() if row.kernels is not None and row.kernels.plan is not None]
    assert won == [1, 2, 4, 8, 16, 24, 32, 1024, 1536, 2048, 3072, 4096, 8192, 16384]
    for m in won:
        ours, stored = run[m].kernels, table[m].kernels
        assert ours is not None and stored is not None and ours.gain is not None and stored.gain is not None
        assert ours.plan == stored.plan
        assert ours.gain.value == pytest.approx(stored.gain.value, abs=2e-3)


def test_the_map_has_every_binary_once_and_counts_add_up() -> None:
    space = of_journal(QWEN).space
    assert space is not None
    assert len({(c.block_m, c.block_n, c.block_k, c.num_warps, c.num_stages) for c in space.cells}) == 480
    assert space.configurations == space.kept + sum(space.dropped.values()) == 1920
    assert space.timed == sum(1 for cell in space.cells if cell.slowdown)
    fastest = [min(c.slowdown["up"] for c in space.cells if "up" in c.slowdown)]
    assert fastest == [1.0]
    assert not [cell for cell in space.cells if cell.dropped_by and cell.slowdown], "timed, though a rule drops it"


def test_a_regret_falls_to_nothing_once_all_are_timed() -> None:
    for row in of_journal(GLM).regret:
        assert list(row.curve) == sorted(row.curve, reverse=True)
        assert row.curve[-1] == 0.0
        assert row.after(10**6) == 0.0


def test_a_run_is_its_folder_too(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes(b"".join(lines_of(QWEN)))
    assert journal_data.read(tmp_path).rows == of_journal(QWEN).rows


def test_an_interrupted_run_is_reported_as_far_as_it_went(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    whole = lines_of(QWEN)
    races = [place for place, line in enumerate(whole) if line.startswith(b'{"r":')]
    path.write_bytes(b"".join(whole[: races[4]]) + b'{"r":[40')
    run = journal_data.read(path)
    known = [row for row in run.rows if row.tuned_us is not None]
    assert known and len(known) < len(run.rows)
    assert any("not finished" in note for note in run.notes)
    assert any("no finished comparison" in note for note in run.notes)


def test_an_unknown_gpu_leaves_out_what_needs_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"".join(lines_of(QWEN)).replace(b'"gpu":"NVIDIA H200"', b'"gpu":"Abacus 9"'))
    run = journal_data.read(path)
    assert (run.gpu, run.space, run.regret) == (None, None, ())
    assert run.rows[0].floor_us is None and run.rows[0].gain is not None


HEADER = lines_of(QWEN)[0]
TIMES = b'{"s":[64,"up",[64,128,128,4,4,false],[1],2],"us":[[%s,2.0]]}\n{"end":true}\n'
BROKEN = {
    "empty": (b"", ":1:"),
    "no journal": (b'{"hello":1}\n', ":1:"),
    "not JSON": (b"\x00\xff" * 100 + b"\n", ":1:"),
    "of a grouped GEMM": (b'{"format":1,"circumstances":{"kernel":"x"}}\n', "names no engine"),
    "no layer": (HEADER.replace(b"E=128,", b"E=0,"), "E"),
    "hostile GPU": (HEADER.replace(b"NVIDIA H200", b"<script>"), "names no GPU"),
    "garbled in the middle": (HEADER + b"{{{\n" + TIMES % b"1.0", ":2:"),
    "a time of nothing": (HEADER + TIMES % b"0.0", "not a positive number"),
    "an endless time": (HEADER + TIMES % b'"inf"', "not a positive number"),
}


@pytest.mark.parametrize(("content", "said"), BROKEN.values(), ids=BROKEN)
def test_a_bad_journal_is_one_clear_line(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(content)
    with pytest.raises(MoEExtError) as raised:
        journal_data.read(path)
    assert said in str(raised.value) and "journal.jsonl" in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def test_a_journal_that_unpacks_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_data, "MOST_BYTES", 4 << 20)
    path = tmp_path / "journal.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * (8 << 20)))
    with pytest.raises(MoEExtError, match="larger than 4 MiB"):
        journal_data.read(path)


def test_too_many_samples_are_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_data, "_MOST_SAMPLES", 100)
    with pytest.raises(MoEExtError, match="samples of layers"):
        journal_data.read(QWEN)


def test_a_folder_without_a_journal_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MoEExtError, match="cannot read"):
        journal_data.read(tmp_path)


def test_our_kernels_are_compared_with_the_tuned_pair(tmp_path: Path) -> None:
    """A recorded run with a race of our kernels, of times made up here."""
    tile = [64, 128, 128, 1, 4, 4, False]
    plan = shipped_plan()
    first = [64, [[tile, tile], plan, [tile, tile]], 4, 0, 0]
    again = [64, [[tile, tile], plan, [tile, tile]], 4, 0, 1]
    us = [[20.0] * 4, [10.0] * 4, [20.0] * 4]
    path = tmp_path / "journal.jsonl"
    lines = [
        HEADER.decode(),
        json.dumps({"r": [64, [[tile, tile]] * 2, 4, 0, 0], "us": [[20.0] * 4] * 2, "n": 2, "why": None, "mhz": 9}),
        json.dumps({"c": [64, [tile, tile]], "e": 0.01}),
        json.dumps({"r": first, "us": us, "n": 2, "why": None, "mhz": 1}),
        json.dumps({"r": again, "us": us, "n": 2, "why": None, "mhz": 1}),
        json.dumps({"c": [64, plan], "e": 0.01}),
    ]
    path.write_text(lines[0] + "\n".join(lines[1:]) + "\n")
    (row,) = journal_data.read(path).rows
    assert row.kernels is not None and row.kernels.gain is not None
    assert math.isclose(row.kernels.gain.value, 2.0)
    assert (row.kernels.us, row.kernels.engine_us, row.kernels.in_graph) == (10.0, 20.0, False)


def shipped_plan() -> object:
    document = json.loads(GLM_H200.with_name(f"{GLM_H200.stem}.paths.json").read_text())
    return document["entries"]["16384"]["path"]
