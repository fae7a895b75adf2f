"""Public reports about tables: the inputs of tests/data/cases, asked of the real SGLang with our hooks in."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path

import pytest
import triton

from sglang_moe_ext import env
from sglang_moe_ext.core import MoEShape, Quantization, TileConfig
from sglang_moe_ext.engines.lookup_probe import LookupRequest, LookupResult
from sglang_moe_ext.engines.sglang import lookup_probe, table_names
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.serving import table_search, table_selection
from sglang_moe_ext.serving.table_search import TableDir
from sglang_moe_ext.serving.table_selection import OurEntry
from tests.engines.installed import engine_environment

pytestmark = pytest.mark.usefixtures("forked_engines")

CASES = Path(__file__).parents[1] / "data" / "cases"
SHAPE = MoEShape(256, 512, 2048, 8, Quantization("fp8_w8a8", (128, 128)))
GB10 = find_gpu("GB10")
WRITTEN = TileConfig(16, 128, 128, 8, 4, 2)
"""Of most of the inputs, the entry at M=64."""
DEFAULT = TileConfig(64, 128, 128, 32, 4, 3)


def with_this_triton(folder: Path, to: Path) -> Path:
    """A copy of the input whose `triton_3_7_1` is the folder of the Triton that runs here."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    for path in sorted(to.rglob("triton_*"), reverse=True):
        path.rename(path.with_name(table_names.version_folder(triton.__version__)))
    return to


@functools.cache
def served(case: str, variable: str, folder: str, root: Path) -> LookupResult:
    """What a server with the plugin takes where the variable names that folder of the case."""
    here = with_this_triton(CASES / case, root / case)
    environment = engine_environment("0.5.23") | {variable: str(here / folder)}
    return lookup_probe.AS_SERVED.ask(LookupRequest(SHAPE, (1, 64), GB10), environment)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cases")


def test_01_a_table_in_vllms_form_is_served_and_said_to_end_sglang_alone(root: Path) -> None:
    answer = served("01-table-with-a-key-that-is-no-number", env.SGLANG_CONFIG_DIR, "", root)
    assert answer.up[64] == WRITTEN
    assert "triton_version" in answer.alone_errors[64] and answer.alone_errors[64].startswith("ValueError")
    assert "the engine alone raises ValueError" in answer.whys[64]
    assert any("the engine alone cannot read it, triton_version" in remark for remark in answer.remarks)


def test_13_a_config_dir_without_configs_is_said_and_the_file_one_level_off_is_named(root: Path) -> None:
    answer = served("13-config-dir-without-configs", env.SGLANG_CONFIG_DIR, "moe", root)
    assert answer.up[64] == DEFAULT
    assert answer.alone_errors[64].startswith("FileNotFoundError")
    no_configs, one_off = answer.remarks
    assert "has no folder configs" in no_configs
    assert "GB10" in one_off and "is not read" in one_off


def test_14_a_table_in_the_users_store_that_is_spelt_as_vllm_does_is_served(root: Path) -> None:
    answer = served("14-name-spelt-as-the-other-engine-does", env.STORE, "store", root)
    assert answer.up[64] == WRITTEN
    assert answer.whys[64].startswith("your table, entry 64")
    assert any("is spelt as the other engine does" in remark for remark in answer.remarks)


def test_15_a_launch_option_that_is_not_known_is_passed_on_and_said(root: Path) -> None:
    answer = served("15-table-with-other-launch-options", env.SGLANG_CONFIG_DIR, "", root)
    assert answer.up[64] == WRITTEN
    assert answer.alone[64]["maxnreg"] == 168
    assert any("maxnreg" in remark for remark in answer.remarks)


def test_21_an_entry_that_the_guard_changes_is_told_with_what_is_written(root: Path) -> None:
    answer = served("21-entry-that-the-guard-changes", env.SGLANG_CONFIG_DIR, "", root)
    assert answer.up[64] == TileConfig(128, 256, 128, 8, 8, 3)
    assert answer.written[64]["up"]["num_stages"] == answer.alone[64]["num_stages"] == 4
    assert answer.fitted[64]["up"] == "fitted to 99 KiB of shared memory: num_stages 4 -> 3; the engine alone would end"
    assert 1 not in answer.fitted


def taken(root: Path, tokens: int = 64, running: str = "3.7.1") -> table_selection.Choice:
    """What the user's store gives a layer under that Triton."""
    found = table_search.search(SHAPE, GB10.device_name, GB10, running, [TableDir("your", root)])
    return table_selection.select(found, tokens)


OWN_BUILDS = ["3.7.1+git9f3a2b1c", "3.8.0-dev20260101", "3.7.1.post1", "3.7.1+cu130.nv26.01"]


@pytest.mark.parametrize("running", OWN_BUILDS)
def test_12_tables_of_an_own_build_of_triton_are_served_from_the_store(running: str, tmp_path: Path) -> None:
    table = next((CASES / "15-table-with-other-launch-options").rglob("E=*.json"))
    folder = tmp_path / table_names.version_folder(running)
    folder.mkdir()
    shutil.copy(table, folder / table.name)
    for triton_version in (running, "3.7.1"):
        chosen = taken(tmp_path, running=triton_version)
        assert isinstance(chosen, OurEntry) and chosen.up == WRITTEN
    assert taken(tmp_path, running=running).why.endswith("(origin unknown)")


@pytest.mark.parametrize("running", OWN_BUILDS[:2])
def test_12_an_own_build_in_the_engines_own_folder_is_not_read_as_sglang_cannot_list_it(
    running: str, tmp_path: Path
) -> None:
    table = next((CASES / "15-table-with-other-launch-options").rglob("E=*.json"))
    folder = tmp_path / table_names.version_folder(running)
    folder.mkdir()
    shutil.copy(table, folder / table.name)
    engines = TableDir("the engine's", tmp_path, is_engines=True)
    assert table_search.search(SHAPE, GB10.device_name, GB10, running, [engines]).candidates == ()


ODD_UPS = {
    "a byte order mark": lambda text: "\ufeff" + text,
    "a whole number with a point": lambda text: text.replace('"num_stages": 2', '"num_stages": 2.0'),
    "an option of AMD's Triton at its default": lambda text: text.replace('"maxnreg": 168', '"waves_per_eu": 0'),
    "a backend": lambda text: text.replace('"maxnreg": 168', '"backend": "flydsl"'),
    "buffers of warp specialisation": lambda text: text.replace('"maxnreg": 168', '"num_buffers_warp_spec": 0'),
    "a comment among the keys": lambda text: text.replace('{\n "1"', '{\n "_comment": "by hand",\n "1"', 1),
    "a row that is no entry": lambda text: text.replace('{\n "1"', '{\n "2": null,\n "1"', 1),
    "keys with spaces": lambda text: text.replace('"64"', '" 64 "'),
}


@pytest.mark.parametrize("change", ODD_UPS.values(), ids=ODD_UPS)
def test_an_odd_table_is_served_as_far_as_it_can_be(change: object, tmp_path: Path) -> None:
    table = next((CASES / "15-table-with-other-launch-options").rglob("E=*.json"))
    folder = tmp_path / "triton_3_7_1"
    folder.mkdir()
    (folder / table.name).write_text(change(table.read_text(encoding="utf-8")), encoding="utf-8")  # type: ignore[operator]
    chosen = taken(tmp_path)
    assert isinstance(chosen, OurEntry) and chosen.up == WRITTEN


ODD_DOWNS = ["", "[]", "{", '{"triton_version": "3.7.1"}', '{"64": {"BLOCK_SIZE_M": 16}}', "\x00", '{"64": 7}']


@pytest.mark.parametrize("text", ODD_DOWNS)
def test_a_sound_up_table_is_not_lost_for_an_odd_down_table(text: str, tmp_path: Path) -> None:
    table = next((CASES / "15-table-with-other-launch-options").rglob("E=*.json"))
    folder = tmp_path / "triton_3_7_1"
    folder.mkdir()
    shutil.copy(table, folder / table.name)
    (folder / f"{table.stem}_down.json").write_text(text, encoding="utf-8")
    chosen = taken(tmp_path)
    assert isinstance(chosen, OurEntry) and (chosen.up, chosen.down) == (WRITTEN, None)


def test_a_down_table_that_is_a_pipe_is_passed_over_at_once(tmp_path: Path) -> None:
    table = next((CASES / "15-table-with-other-launch-options").rglob("E=*.json"))
    folder = tmp_path / "triton_3_7_1"
    folder.mkdir()
    shutil.copy(table, folder / table.name)
    os.mkfifo(folder / f"{table.stem}_down.json")
    chosen = taken(tmp_path)
    assert isinstance(chosen, OurEntry) and chosen.up == WRITTEN
