"""What is known of an entry survives the disk; what cannot be trusted is unknown, and so counts as measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext.core import TableError
from sglang_moe_ext.tables import config_table, merge, provenance
from sglang_moe_ext.tables.provenance import Provenance, ProvenanceEntry
from tests.tables import generated

json_documents = st.recursive(
    st.none() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["format", "runs", "entries", "1", "origin", "run"]), inner, max_size=4)
    ),
)
KNOWN = Provenance({64: ProvenanceEntry("predicted", generated.A_RUN, {"us": 1.5})})
DAMAGE = {
    "cut short": provenance.to_json(KNOWN)[:-40].encode(),
    "empty": b"",
    "no JSON": b"\xff\xfe\x00",
    "a list": b"[]",
    "deeply nested": b"[" * 100_000,
    "another format": provenance.to_json(KNOWN).replace('"format": 1', '"format": 2').encode(),
    "unknown origin": provenance.to_json(KNOWN).replace('"predicted"', '"guessed"').encode(),
    "a run that is not there": provenance.to_json(KNOWN).replace('"run": 0', '"run": 7').encode(),
    "figures that are none": provenance.to_json(KNOWN).replace('"us": 1.5', '"us": "fast"').encode(),
    "a run with a list in it": provenance.to_json(KNOWN).replace('"2026-11-21"', '["2026-11-21"]').encode(),
    "a key that is no number": provenance.to_json(KNOWN).replace('"64"', '"many"').encode(),
}


@given(generated.provenances)
def test_what_was_written_is_what_is_read(known: Provenance) -> None:
    assert provenance.parse(json.loads(provenance.to_json(known))) == known


@given(generated.provenances)
def test_a_run_that_made_many_entries_is_written_once(known: Provenance) -> None:
    written = json.loads(provenance.to_json(known))["runs"]
    assert len(written) == len({entry.run for entry in known.entries.values()})


@given(json_documents)
def test_any_json_is_provenance_or_a_table_error(document: object) -> None:
    try:
        provenance.parse(document)
    except TableError as error:
        assert str(error)


@given(data=st.binary(max_size=64))
def test_any_bytes_beside_a_table_are_provenance_or_unknown(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    table = tmp_path_factory.getbasetemp() / "any_bytes.json"
    provenance.sidecar(table).write_bytes(data)
    read = provenance.read(table)
    assert read is not None and read.entries == {} and read.broken


@pytest.mark.parametrize("data", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_provenance_is_broken_and_names_the_file(tmp_path: Path, data: bytes) -> None:
    table = tmp_path / "table.json"
    provenance.sidecar(table).write_bytes(data)
    read = provenance.read(table)
    assert read is not None and read.entries == {}
    assert str(provenance.sidecar(table)) in str(read.broken)


def test_a_table_without_a_provenance_file_has_no_provenance(tmp_path: Path) -> None:
    assert provenance.read(tmp_path / "table.json") is None


@pytest.mark.parametrize("data", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_table_with_damaged_provenance_is_worth_no_more_than_a_predicted_one(tmp_path: Path, data: bytes) -> None:
    table = tmp_path / "table.json"
    table.write_text(config_table.to_json({64: generated.config()}))
    provenance.sidecar(table).write_bytes(data)
    stored = merge.read(table)
    assert stored is not None and not stored.has_measured()


def test_a_predicted_table_never_replaces_one_with_damaged_provenance(tmp_path: Path) -> None:
    """It may have been measured."""
    table = tmp_path / "table.json"
    table.write_text(config_table.to_json({64: generated.config()}))
    provenance.sidecar(table).write_bytes(DAMAGE["cut short"])
    predicted = merge.StoredTable({64: generated.config()}, KNOWN)
    assert isinstance(merge.merge_tables(merge.read(table), predicted), merge.RefusedTable)


def test_a_table_without_provenance_counts_as_measured(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    table.write_text(config_table.to_json({64: generated.config()}))
    stored = merge.read(table)
    assert stored is not None and stored.has_measured()


def test_an_entry_that_the_provenance_does_not_name_counts_as_measured() -> None:
    assert merge.StoredTable({64: generated.config(), 128: generated.config()}, KNOWN).has_measured()


def test_a_table_all_of_whose_entries_are_predicted_has_nothing_measured() -> None:
    assert not merge.StoredTable({64: generated.config()}, KNOWN).has_measured()


def test_the_engines_take_no_provenance_file_for_a_table(tmp_path: Path) -> None:
    name = "E=8,N=64,device_name=NVIDIA_H200_down.json"
    assert provenance.sidecar(tmp_path / name).name == "E=8,N=64,device_name=NVIDIA_H200_down.provenance.json"
