"""Files of configurations come from anywhere: what is a table is read exactly, and all else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_moe_ext.core import Table, TableError, TileConfig
from sglang_moe_ext.tables import config_table
from tests.examples import examples
from tests.tables import generated

ENTRY = {
    "BLOCK_SIZE_M": 16,
    "BLOCK_SIZE_N": 64,
    "BLOCK_SIZE_K": 128,
    "GROUP_SIZE_M": 1,
    "num_warps": 4,
    "num_stages": 3,
}
CONFIG = TileConfig(16, 64, 128, 1, 4, 3)

json_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
json_documents = st.recursive(
    json_scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
nearly_tables = st.dictionaries(
    st.integers(-1, 9).map(str) | st.text(max_size=3),
    st.dictionaries(st.sampled_from([*ENTRY, "USE_TMA", "kpack", "other"]), json_scalars | st.integers(0, 300))
    | st.just(ENTRY),
    max_size=3,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables") / "table.json"


def read_or_refusal(path: Path, data: bytes) -> Table | str:
    """What `read` makes of the bytes; any error but a TableError that names the file fails the test."""
    path.write_bytes(data)
    try:
        return config_table.read(path)
    except TableError as error:
        assert str(path) in str(error), f"refused without naming the file: {error}"
        return str(error)


@given(generated.tables)
def test_a_table_that_was_written_is_read_as_the_same_table(table: Table) -> None:
    assert config_table.parse(json.loads(config_table.to_json(table))) == table


@given(generated.tables)
def test_tma_is_named_only_where_it_is_on(table: Table) -> None:
    """Engines that do not know USE_TMA raise where they meet it, on or off."""
    written = json.loads(config_table.to_json(table))
    assert {int(m) for m, entry in written.items() if "USE_TMA" in entry} == {m for m in table if table[m].use_tma}


@given(generated.tables)
def test_a_table_is_written_in_order_of_m(table: Table) -> None:
    assert list(json.loads(config_table.to_json(table))) == [str(m) for m in sorted(table)]


@settings(max_examples=examples(5))
@given(table=generated.tables)
def test_a_file_cut_short_at_any_byte_is_whole_or_refused_by_name(file: Path, table: Table) -> None:
    data = config_table.to_json(table).encode()
    for length in range(len(data)):
        whole = data[:length].rstrip() == data.rstrip()
        found = read_or_refusal(file, data[:length])
        assert found == table if whole else isinstance(found, str), length


@given(document=json_documents | nearly_tables)
def test_any_json_is_a_table_or_refused_by_name(file: Path, document: object) -> None:
    read_or_refusal(file, json.dumps(document).encode())


@given(data=st.binary())
@example(b"[" * 100_000)
@example(b'{"1":' * 100_000)
@example(b"9" * 5000)
@example(b'{"' + b"9" * 5000 + b'": {}}')
@example(b'{"1": {"BLOCK_SIZE_M": ' + b"9" * 5000 + b"}}")
def test_any_bytes_are_a_table_or_refused_by_name(file: Path, data: bytes) -> None:
    read_or_refusal(file, data)


@given(document=json_documents | nearly_tables)
@example({"9" * 5000: ENTRY})
def test_parsing_raises_nothing_but_a_table_error(document: object) -> None:
    try:
        config_table.parse(document)
    except TableError as error:
        assert str(error)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_an_encoding_that_the_engines_cannot_read_is_refused(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(json.dumps({"1": ENTRY}).encode(encoding))
    with pytest.raises(TableError, match=r"table\.json"):
        config_table.read(path)


@pytest.mark.parametrize(
    "key",
    ["+1", "01", "١", "1.0", "-1", "0", "", " 1", "1 ", "1_000", "1e3", "0x10", "²", "１", "true"],
    ids=["plus", "leading zero", "arabic", "decimal", "negative", "zero", "empty", "space before", "space after",
         "underscore", "exponent", "hexadecimal", "superscript", "full width", "word"],
)  # fmt: skip
def test_a_key_that_is_not_plainly_a_number_of_tokens_is_refused(key: str) -> None:
    with pytest.raises(TableError, match="expected a number of tokens"):
        config_table.parse({"64": ENTRY, key: ENTRY})


def test_the_triton_version_that_vllm_writes_is_passed_over() -> None:
    assert config_table.parse({"triton_version": "3.7.1", "64": ENTRY}) == {64: CONFIG}


def test_a_file_with_nothing_but_a_triton_version_is_no_table() -> None:
    with pytest.raises(TableError, match="no entries"):
        config_table.parse({"triton_version": "3.7.1"})


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(True, id="bool"),
        pytest.param(16.0, id="whole float"),
        pytest.param(16.5, id="float"),
        pytest.param(float("nan"), id="nan"),
        pytest.param(float("inf"), id="infinity"),
        pytest.param("16", id="text"),
        pytest.param(None, id="null"),
        pytest.param([16], id="list"),
        pytest.param(0, id="zero"),
        pytest.param(-16, id="negative"),
        pytest.param(24, id="no power of two"),
        pytest.param(2048, id="too large"),
        pytest.param(10**30, id="huge"),
    ],
)
def test_a_block_size_that_no_kernel_can_have_is_refused(value: Any) -> None:
    with pytest.raises(TableError, match="entry 64 has BLOCK_SIZE_M="):
        config_table.parse({"64": ENTRY | {"BLOCK_SIZE_M": value}})


@pytest.mark.parametrize(
    ("name", "value"), [("num_warps", 3), ("num_warps", 64), ("num_stages", 17), ("num_stages", 0)]
)
def test_warps_and_stages_that_no_kernel_can_have_are_refused(name: str, value: int) -> None:
    with pytest.raises(TableError, match=f"entry 64 has {name}={value}"):
        config_table.parse({"64": ENTRY | {name: value}})


@pytest.mark.parametrize("value", [1, 0, "true", None])
def test_a_tma_switch_that_is_no_boolean_is_refused(value: Any) -> None:
    with pytest.raises(TableError, match="USE_TMA"):
        config_table.parse({"64": ENTRY | {"USE_TMA": value}})


@pytest.mark.parametrize("missing", ["BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M"])
def test_an_entry_without_a_field_is_refused(missing: str) -> None:
    with pytest.raises(TableError, match=f"{missing}=nothing"):
        config_table.parse({"64": {name: value for name, value in ENTRY.items() if name != missing}})


def test_warps_and_stages_that_are_not_named_are_tritons_own() -> None:
    bare = {name: value for name, value in ENTRY.items() if not name.startswith("num_")}
    assert config_table.parse({"64": bare})[64] == TileConfig(16, 64, 128, 1, num_warps=4, num_stages=3)


def test_a_misspelt_field_is_refused() -> None:
    with pytest.raises(TableError, match="BLOCK_SIZE_X"):
        config_table.parse({"64": ENTRY | {"BLOCK_SIZE_X": 1}})


def test_a_file_too_large_to_be_a_table_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(b" " * (4 * 1024 * 1024) + json.dumps({"1": ENTRY}).encode())
    with pytest.raises(TableError, match="larger than"):
        config_table.read(path)


@pytest.mark.parametrize("place", ["absent.json", "."], ids=["nothing", "a folder"])
def test_a_place_without_a_file_is_refused_by_name(tmp_path: Path, place: str) -> None:
    with pytest.raises(TableError, match="cannot read table"):
        config_table.read(tmp_path / place)


@given(table=generated.tables, tokens=generated.token_counts)
def test_the_nearest_entry_is_the_one_that_the_engines_take(table: Table, tokens: int) -> None:
    """Both engines say `configs[min(configs.keys(), key=lambda x: abs(x - M))]` of the file's own order."""
    as_read = config_table.parse(json.loads(config_table.to_json(table)))
    engine_configs = {int(key): value for key, value in json.loads(config_table.to_json(table)).items()}
    assert config_table.nearest(as_read, tokens) == min(engine_configs.keys(), key=lambda x: abs(x - tokens))


def test_of_two_entries_equally_near_the_first_is_taken() -> None:
    assert config_table.nearest({8: CONFIG, 16: CONFIG}, 12) == 8
