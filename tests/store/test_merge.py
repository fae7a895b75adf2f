"""A new table meets an old one: nothing measured is ever lost to a prediction, and nothing by accident."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext.core import Origin, TableError
from sglang_moe_ext.store import merge, provenance, tables
from sglang_moe_ext.store.merge import Refused, Stored
from sglang_moe_ext.store.provenance import Entry, Provenance
from tests.store import generated

small_tables = st.dictionaries(st.integers(1, 6), generated.configs, min_size=1, max_size=4)


@st.composite
def stored_tables(draw: st.DrawFn) -> Stored:
    """A table of which everything, something, or nothing is known; an entry unknown to its provenance included."""
    table = draw(small_tables)
    origins = draw(st.dictionaries(st.sampled_from(sorted(table)), st.sampled_from(["measured", "predicted"])))
    entries = {m: Entry(origin, generated.A_RUN) for m, origin in origins.items()}
    return Stored(table, draw(st.sampled_from([None, Provenance(entries)])))


def made(origin: Origin, table: dict[int, int]) -> Stored:
    """A table of one origin, from M -> BLOCK_SIZE_N."""
    return Stored(
        {m: generated.config(block_n) for m, block_n in table.items()},
        Provenance({m: Entry(origin, generated.A_RUN) for m in table}),
    )


def bare(table: dict[int, int]) -> Stored:
    """A table without provenance, as it comes with the engine."""
    return Stored({m: generated.config(block_n) for m, block_n in table.items()}, None)


def is_predicted(stored: Stored, m: int) -> bool:
    return stored.provenance is not None and stored.provenance.origin(m) == "predicted"


@given(stored_tables(), stored_tables())
def test_a_prediction_never_changes_what_a_measured_table_says(old: Stored, new: Stored) -> None:
    result = merge.merged(old, new)
    if old.has_measured() and isinstance(result, Stored):
        accepted = {m for m in new.table if not is_predicted(new, m)}
        unchanged = {m: config for m, config in old.table.items() if m not in accepted}
        assert {m: config for m, config in result.table.items() if m not in accepted} == unchanged


@given(stored_tables(), stored_tables())
def test_no_entry_of_the_old_table_is_lost(old: Stored, new: Stored) -> None:
    result = merge.merged(old, new)
    assert isinstance(result, Refused) or set(old.table) <= set(result.table)


@given(stored_tables(), stored_tables())
def test_no_measured_entry_of_the_new_table_is_lost(old: Stored, new: Stored) -> None:
    result = merge.merged(old, new)
    table = {} if isinstance(result, Refused) else result.table
    fresh = {m: config for m, config in new.table.items() if not is_predicted(new, m)}
    assert fresh.items() <= table.items()


@given(stored_tables(), stored_tables())
def test_what_is_known_of_an_entry_is_what_its_own_side_knew(old: Stored, new: Stored) -> None:
    result = merge.merged(old, new)
    if isinstance(result, Refused):
        return
    for m in result.table:
        side = new if m in new.table and not (old.has_measured() and is_predicted(new, m)) else old
        assert is_predicted(result, m) == is_predicted(side, m), m


@pytest.mark.parametrize("old", [made("measured", {64: 32}), bare({64: 32})], ids=["measured", "without provenance"])
@pytest.mark.parametrize("m", [64, 128], ids=["the same M", "another M"])
def test_a_predicted_table_is_refused_where_a_measured_one_lies(old: Stored, m: int) -> None:
    assert isinstance(merge.merged(old, made("predicted", {m: 128})), Refused)


def test_one_measured_entry_protects_the_whole_table() -> None:
    old = merge.merged(made("predicted", {1: 32, 64: 32}), made("measured", {64: 64}))
    assert isinstance(old, Stored)
    assert isinstance(merge.merged(old, made("predicted", {1: 128})), Refused)


def test_a_measured_table_replaces_a_predicted_one_entry_by_entry() -> None:
    result = merge.merged(made("predicted", {1: 32, 64: 32}), made("measured", {64: 128, 256: 128}))
    assert isinstance(result, Stored)
    assert {m: config.block_n for m, config in result.table.items()} == {1: 32, 64: 128, 256: 128}


def test_a_prediction_replaces_a_prediction() -> None:
    result = merge.merged(made("predicted", {64: 32}), made("predicted", {64: 128}))
    assert isinstance(result, Stored) and result.table[64].block_n == 128


def test_a_table_without_provenance_in_the_place_of_a_predicted_one_counts_as_measured() -> None:
    result = merge.merged(made("predicted", {64: 32}), bare({64: 128}))
    assert isinstance(result, Stored) and result.has_measured()


def test_a_new_place_takes_the_new_table_as_it_is() -> None:
    new = made("predicted", {64: 32})
    assert merge.merged(None, new) == new


@given(stored_tables(), stored_tables())
def test_what_was_put_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, old: Stored, new: Stored) -> None:
    path = tmp_path_factory.mktemp("put") / "table.json"
    merge.put({path: old})
    result = merge.put({path: new})[path]
    expected = old if isinstance(result, Refused) else result
    found = merge.read(path)
    assert found == Stored(dict(sorted(expected.table.items())), expected.provenance)


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
    assert (tables.read(up)[64].block_n, tables.read(down)[64].block_n) == (32, 128)


def test_a_broken_table_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("{")
    with pytest.raises(TableError, match=r"table\.json"):
        merge.put({path: made("measured", {64: 32})})


def rows(table: dict[int, int]) -> Stored:
    """A measured table, from M -> BLOCK_SIZE_M."""
    entries = {m: Entry("measured", generated.A_RUN) for m in table}
    return Stored(
        {m: replace(generated.config(64), block_m=block_m) for m, block_m in table.items()}, Provenance(entries)
    )


def block_m(path: Path) -> dict[int, int]:
    return {m: config.block_m for m, config in tables.read(path).items()}


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
    assert all(isinstance(result, Refused) for result in results.values())
    assert not down.exists()


def test_a_key_that_the_down_table_lacks_gets_the_up_entry_that_ran_there(tmp_path: Path) -> None:
    up, down = tmp_path / "E.json", tmp_path / "E_down.json"
    merge.put({up: rows({1: 16, 64: 32, 4096: 128})})
    merge.put({up: rows({64: 32}), down: rows({64: 32})}, [(up, down)])
    before = tables.read(up)[4096]
    assert tables.read(down)[4096] == before
    known = provenance.read(down)
    assert known is not None
    assert sorted(known.entries) == [64]
