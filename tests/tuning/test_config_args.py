"""What --configs and --cmp-configs mean: six numbers, and files from anywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext.core import Table, TableError, TileConfig
from sglang_moe_ext.tables import config_table, provenance
from sglang_moe_ext.tuning.config_args import NUMBERS, pairs_of_tables, parse_configs, parse_tables

SMALL = TileConfig(16, 32, 64, 1, 4, 2)
LARGE = TileConfig(128, 128, 64, 16, 8, 3)
NAME = "E=65,N=1536,device_name=NVIDIA_H200.json"
DOWN_NAME = "E=65,N=1536,device_name=NVIDIA_H200_down.json"
POWERS = st.sampled_from((16, 32, 64, 128, 256))
CONFIGS = st.builds(
    TileConfig, POWERS, POWERS, POWERS, st.integers(1, 64), st.sampled_from((1, 2, 4, 8)), st.integers(1, 8)
)
TABLES = st.dictionaries(st.integers(1, 20_000), CONFIGS, min_size=1, max_size=8)


def written(path: Path, table: Table) -> Path:
    path.write_text(config_table.to_json(table), encoding="utf-8")
    return path


@given(CONFIGS)
def test_six_numbers_are_the_configuration_they_name(config: TileConfig) -> None:
    numbers = (
        config.block_m,
        config.block_n,
        config.block_k,
        config.group_m,
        config.num_warps,
        config.num_stages,
    )
    assert parse_configs(numbers) == config


@pytest.mark.parametrize("count", [0, 1, 5, 7])
def test_another_count_than_six_is_told_with_what_the_six_are(count: int) -> None:
    with pytest.raises(TableError, match=rf"expected 6 numbers, {' '.join(NUMBERS)}; it has {count}$"):
        parse_configs([16] * count)


@pytest.mark.parametrize("place", range(len(NUMBERS)), ids=NUMBERS)
def test_an_impossible_number_is_told_by_its_name_and_never_as_an_entry_of_a_file(place: int) -> None:
    numbers = [16, 32, 64, 1, 4, 2]
    numbers[place] = 0
    with pytest.raises(TableError, match=f"^--configs [0-9 ]+: {NUMBERS[place]}=0: expected"):
        parse_configs(numbers)


@pytest.mark.parametrize("numbers", [(24, 32, 64, 1, 4, 2), (16, 32, 64, 1, 3, 2), (2048, 32, 64, 1, 4, 2)])
def test_a_number_that_no_kernel_takes_is_refused(numbers: tuple[int, ...]) -> None:
    with pytest.raises(TableError, match=r"^--configs"):
        parse_configs(numbers)


def test_tables_keep_the_order_and_the_names_of_their_files(tmp_path: Path) -> None:
    second = written(tmp_path / "b.json", {1: LARGE})
    first = written(tmp_path / "a.json", {1: SMALL})
    assert [(table.name, table.up) for table in parse_tables([second, first])] == [
        (str(second), {1: LARGE}),
        (str(first), {1: SMALL}),
    ]


def test_the_down_table_beside_a_file_goes_with_it(tmp_path: Path) -> None:
    up = written(tmp_path / NAME, {1: SMALL})
    written(tmp_path / DOWN_NAME, {1: LARGE})
    (found,) = parse_tables([up])
    assert found.down == {1: LARGE}


def test_a_file_without_a_down_table_beside_it_has_none(tmp_path: Path) -> None:
    (found,) = parse_tables([written(tmp_path / NAME, {1: SMALL})])
    assert found.down is None


def test_a_whole_folder_of_ours_is_one_choice_and_not_four(tmp_path: Path) -> None:
    up, down = written(tmp_path / NAME, {1: SMALL}), written(tmp_path / DOWN_NAME, {1: LARGE})
    for path in (up, down):
        provenance.sidecar(path).write_text("{}", encoding="utf-8")
    (found,) = parse_tables(sorted(tmp_path.glob("*.json")))
    assert (found.name, found.up, found.down) == (str(up), {1: SMALL}, {1: LARGE})


def test_a_down_table_alone_is_refused_with_the_file_to_give_instead(tmp_path: Path) -> None:
    down = written(tmp_path / DOWN_NAME, {1: LARGE})
    with pytest.raises(TableError, match="down projection alone: give") as error:
        parse_tables([down])
    assert str(tmp_path / NAME) in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"x": {}}', '{"1": {"BLOCK_SIZE_M": 17}}', "\0"])
def test_a_file_that_is_no_table_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TableError, match=r"mine\.json"):
        parse_tables([path])


def test_a_broken_down_table_is_not_passed_over(tmp_path: Path) -> None:
    up = written(tmp_path / NAME, {1: SMALL})
    (tmp_path / DOWN_NAME).write_text("{", encoding="utf-8")
    with pytest.raises(TableError, match="_down"):
        parse_tables([up])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"cannot read table .*nowhere\.json"):
        parse_tables([tmp_path / "nowhere.json"])


def test_the_nearest_entry_of_each_table_is_taken() -> None:
    pairs = pairs_of_tables({1: SMALL, 100: LARGE}, {40: SMALL, 1000: LARGE}, (1, 60, 600))
    assert [(pair["up"], pair["down"].block_n) for pair in pairs.values()] == [
        (SMALL, SMALL.block_n),
        (LARGE, SMALL.block_n),
        (LARGE, LARGE.block_n),
    ]


def test_one_table_serves_both_gemms_and_only_the_up_one_with_tma() -> None:
    with_tma = replace(SMALL, use_tma=True)
    assert pairs_of_tables({1: with_tma}, None, [8]) == {8: {"up": with_tma, "down": SMALL}}


def test_a_down_table_may_say_tma() -> None:
    with_tma = replace(SMALL, use_tma=True)
    assert pairs_of_tables({1: SMALL}, {1: with_tma}, [8])[8]["down"] == with_tma


@given(TABLES, st.none() | TABLES, st.lists(st.integers(1, 100_000), unique=True, max_size=5))
def test_every_pair_shares_one_block_size_m(up: Table, down: Table | None, tokens: list[int]) -> None:
    pairs = pairs_of_tables(up, down, tokens)
    assert list(pairs) == tokens
    assert all(pair["down"].block_m == pair["up"].block_m for pair in pairs.values())
