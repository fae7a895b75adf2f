"""A new table meets an old one: nothing measured is ever lost to a prediction, and nothing by accident."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext.core import Origin, TableError
from sglang_moe_ext.tables import config_table, merge, provenance
from sglang_moe_ext.tables.merge import RefusedTable, StoredTable
from sglang_moe_ext.tables.provenance import Provenance, ProvenanceEntry
from tests.tables import generated

REPO_ROOT = Path(__file__).resolve().parents[2]
WRITERS = 8
ENTRIES_EACH = 10

WRITER = """
import sys
from pathlib import Path
from sglang_moe_ext.tables import merge
from tests.tables.test_merge import made

print("ready", flush=True)
sys.stdin.readline()
for m in map(int, sys.argv[2:]):
    merge.put({Path(path): made("measured", {m: 64}) for path in sys.argv[1].split(":")})
"""

small_tables = st.dictionaries(st.integers(1, 6), generated.configs, min_size=1, max_size=4)


@pytest.fixture(scope="module", autouse=True)
def user_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Locks go to a store of these tests."""
    store = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_MOE_EXT_STORE", str(store))
        yield store


@st.composite
def stored_tables(draw: st.DrawFn) -> StoredTable:
    """A table of which everything, something, or nothing is known; an entry unknown to its provenance included."""
    table = draw(small_tables)
    origins = draw(st.dictionaries(st.sampled_from(sorted(table)), st.sampled_from(["measured", "predicted"])))
    entries = {m: ProvenanceEntry(origin, generated.A_RUN) for m, origin in origins.items()}
    return StoredTable(table, draw(st.sampled_from([None, Provenance(entries)])))


def made(origin: Origin, table: dict[int, int]) -> StoredTable:
    """A table of one origin, from M -> BLOCK_SIZE_N."""
    return StoredTable(
        {m: generated.config(block_n) for m, block_n in table.items()},
        Provenance({m: ProvenanceEntry(origin, generated.A_RUN) for m in table}),
    )


def bare(table: dict[int, int]) -> StoredTable:
    """A table without provenance, as it comes with the engine."""
    return StoredTable({m: generated.config(block_n) for m, block_n in table.items()}, None)


def is_predicted(stored: StoredTable, m: int) -> bool:
    return stored.provenance is not None and stored.provenance.origin(m) == "predicted"


@given(stored_tables(), stored_tables())
def test_a_prediction_never_changes_what_a_measured_table_says(old: StoredTable, new: StoredTable) -> None:
    result = merge.merge_tables(old, new)
    if old.has_measured() and isinstance(result, StoredTable):
        accepted = {m for m in new.table if not is_predicted(new, m)}
        unchanged = {m: config for m, config in old.table.items() if m not in accepted}
        assert {m: config for m, config in result.table.items() if m not in accepted} == unchanged


@given(stored_tables(), stored_tables())
def test_no_entry_of_the_old_table_is_lost(old: StoredTable, new: StoredTable) -> None:
    result = merge.merge_tables(old, new)
    assert isinstance(result, RefusedTable) or set(old.table) <= set(result.table)


@given(stored_tables(), stored_tables())
def test_no_measured_entry_of_the_new_table_is_lost(old: StoredTable, new: StoredTable) -> None:
    result = merge.merge_tables(old, new)
    table = {} if isinstance(result, RefusedTable) else result.table
    fresh = {m: config for m, config in new.table.items() if not is_predicted(new, m)}
    assert fresh.items() <= table.items()


@given(stored_tables(), stored_tables())
def test_what_is_known_of_an_entry_is_what_its_own_side_knew(old: StoredTable, new: StoredTable) -> None:
    result = merge.merge_tables(old, new)
    if isinstance(result, RefusedTable):
        return
    for m in result.table:
        side = new if m in new.table and not (old.has_measured() and is_predicted(new, m)) else old
        assert is_predicted(result, m) == is_predicted(side, m), m


@pytest.mark.parametrize("old", [made("measured", {64: 32}), bare({64: 32})], ids=["measured", "without provenance"])
@pytest.mark.parametrize("m", [64, 128], ids=["the same M", "another M"])
def test_a_predicted_table_is_refused_where_a_measured_one_lies(old: StoredTable, m: int) -> None:
    assert isinstance(merge.merge_tables(old, made("predicted", {m: 128})), RefusedTable)


def test_one_measured_entry_protects_the_whole_table() -> None:
    old = merge.merge_tables(made("predicted", {1: 32, 64: 32}), made("measured", {64: 64}))
    assert isinstance(old, StoredTable)
    assert isinstance(merge.merge_tables(old, made("predicted", {1: 128})), RefusedTable)


def test_a_measured_table_replaces_a_predicted_one_entry_by_entry() -> None:
    result = merge.merge_tables(made("predicted", {1: 32, 64: 32}), made("measured", {64: 128, 256: 128}))
    assert isinstance(result, StoredTable)
    assert {m: config.block_n for m, config in result.table.items()} == {1: 32, 64: 128, 256: 128}


def test_a_prediction_replaces_a_prediction() -> None:
    result = merge.merge_tables(made("predicted", {64: 32}), made("predicted", {64: 128}))
    assert isinstance(result, StoredTable) and result.table[64].block_n == 128


def test_a_table_without_provenance_in_the_place_of_a_predicted_one_counts_as_measured() -> None:
    result = merge.merge_tables(made("predicted", {64: 32}), bare({64: 128}))
    assert isinstance(result, StoredTable) and result.has_measured()


WORTH: tuple[Origin, ...] = ("measured", "transferred", "predicted")


@pytest.mark.parametrize(("there", "new"), itertools.product(WORTH, WORTH))
def test_what_is_worth_less_never_replaces_what_is_worth_more(there: Origin, new: Origin) -> None:
    result = merge.merge_tables(made(there, {64: 32}), made(new, {128: 32}))
    assert isinstance(result, RefusedTable) == (WORTH.index(new) > WORTH.index(there))


def test_of_a_new_table_only_what_is_worth_as_much_is_taken() -> None:
    new = merge.merge_tables(made("predicted", {1: 128}), made("transferred", {256: 128}))
    assert isinstance(new, StoredTable)
    result = merge.merge_tables(made("transferred", {64: 32}), new)
    assert isinstance(result, StoredTable) and set(result.table) == {64, 256}


def test_a_new_place_takes_the_new_table_as_it_is() -> None:
    new = made("predicted", {64: 32})
    assert merge.merge_tables(None, new) == new


@given(stored_tables(), stored_tables())
def test_what_was_put_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, old: StoredTable, new: StoredTable
) -> None:
    path = tmp_path_factory.mktemp("put") / "table.json"
    merge.put({path: old})
    result = merge.put({path: new})[path]
    expected = old if isinstance(result, RefusedTable) else result
    found = merge.read(path)
    assert found == StoredTable(dict(sorted(expected.table.items())), expected.provenance)


def test_a_refused_table_leaves_every_byte_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    merge.put({path: made("measured", {64: 32})})
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    merge.put({path: made("predicted", {64: 128})})
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_refusal_does_not_hold_up_the_other_tables(tmp_path: Path) -> None:
    up, down = tmp_path / "up.json", tmp_path / "down.json"
    merge.put({up: made("measured", {64: 32})})
    merge.put(dict.fromkeys((up, down), made("predicted", {64: 128})))
    assert (config_table.read(up)[64].block_n, config_table.read(down)[64].block_n) == (32, 128)


def test_a_broken_table_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("{")
    with pytest.raises(TableError, match=r"table\.json"):
        merge.put({path: made("measured", {64: 32})})


def rows(table: dict[int, int]) -> StoredTable:
    """A measured table, from M -> BLOCK_SIZE_M."""
    entries = {m: ProvenanceEntry("measured", generated.A_RUN) for m in table}
    return StoredTable(
        {m: replace(generated.config(64), block_m=block_m) for m, block_m in table.items()}, Provenance(entries)
    )


def block_m(path: Path) -> dict[int, int]:
    return {m: config.block_m for m, config in config_table.read(path).items()}


def test_a_pair_has_the_same_keys_and_one_block_size_m_at_each(tmp_path: Path) -> None:
    up, down = tmp_path / "E.json", tmp_path / "E_down.json"
    merge.put({up: rows({1: 16, 96: 64})})
    merge.put({down: rows({1: 16, 80: 128})})
    merge.put({up: rows({64: 32}), down: rows({64: 32})}, [(up, down)])
    assert block_m(up) == block_m(down) == {1: 16, 64: 32, 80: 32, 96: 64}  # 80 is as near to 64, and that comes first


def test_of_a_pair_both_are_refused_or_none(tmp_path: Path) -> None:
    up, down = tmp_path / "E.json", tmp_path / "E_down.json"
    merge.put({up: made("measured", {64: 32})})
    results = merge.put(dict.fromkeys((up, down), made("predicted", {64: 128})), [(up, down)])
    assert all(isinstance(result, RefusedTable) for result in results.values())
    assert not down.exists()


def test_a_key_that_the_down_table_lacks_gets_the_up_entry_that_ran_there(tmp_path: Path) -> None:
    up, down = tmp_path / "E.json", tmp_path / "E_down.json"
    merge.put({up: rows({1: 16, 64: 32, 4096: 128})})
    merge.put({up: rows({64: 32}), down: rows({64: 32})}, [(up, down)])
    before = config_table.read(up)[4096]
    assert config_table.read(down)[4096] == before
    known = provenance.read(down)
    assert known is not None
    assert sorted(known.entries) == [64]


def put_at_once(places: list[list[Path]]) -> None:
    """One process for each list of places, which all begin together and each put other entries there."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, ":".join(map(str, paths)), *map(str, entries_of(writer))],
            env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for writer, paths in enumerate(places)
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    assert [writer.communicate(timeout=60)[1] for writer in writers] == [""] * len(writers)


def entries_of(writer: int) -> list[int]:
    return [writer + 1 + WRITERS * turn for turn in range(ENTRIES_EACH)]


def test_processes_that_write_one_table_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    put_at_once([[path]] * WRITERS)
    assert sorted(config_table.read(path)) == list(range(1, WRITERS * ENTRIES_EACH + 1))


def test_the_provenance_of_tables_written_at_once_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    put_at_once([[path]] * WRITERS)
    known = provenance.read(path)
    assert known is not None and sorted(known.entries) == list(range(1, WRITERS * ENTRIES_EACH + 1))


def test_a_folder_under_two_names_has_one_lock(tmp_path: Path) -> None:
    folder, link = tmp_path / "configs", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    put_at_once([[(folder, link)[writer % 2] / "table.json"] for writer in range(WRITERS)])
    assert sorted(config_table.read(folder / "table.json")) == list(range(1, WRITERS * ENTRIES_EACH + 1))


def test_processes_that_write_two_folders_in_either_order_do_not_wait_for_each_other(tmp_path: Path) -> None:
    places = [tmp_path / "one" / "table.json", tmp_path / "two" / "table.json"]
    put_at_once([places[:: (-1) ** writer] for writer in range(WRITERS)])
    assert [len(config_table.read(path)) for path in places] == [WRITERS * ENTRIES_EACH] * 2


def test_no_lock_file_lies_where_an_engine_reads(tmp_path: Path) -> None:
    merge.put({tmp_path / "table.json": made("measured", {64: 32})})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["table.json", "table.provenance.json"]


def test_a_store_that_holds_no_lock_stops_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "file" / "store"))
    with caplog.at_level(logging.INFO, logger="sglang_moe_ext"):
        merge.put({tmp_path / "table.json": made("measured", {64: 32})})
    assert (sorted(config_table.read(tmp_path / "table.json")), "without a lock" in caplog.text) == ([64], True)


def test_a_user_without_a_home_can_write_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SGLANG_MOE_EXT_STORE")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    merge.put({tmp_path / "table.json": made("measured", {64: 32})})
    assert sorted(config_table.read(tmp_path / "table.json")) == [64]
