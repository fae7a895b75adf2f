"""Where a server looks for tables, as its environment and its user's home make it."""

from __future__ import annotations

import pwd
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext import env, package_data
from sglang_moe_ext.engines.sglang import overlay as directory
from sglang_moe_ext.engines.sglang.installation import SglangInstallation
from sglang_moe_ext.serving.sglang_hooks import table_dirs

CONFIG_MODULE = "srt/layers/moe/moe_runner/triton_utils/fused_moe_triton_config.py"


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SglangInstallation:
    module = tmp_path / "sglang" / CONFIG_MODULE
    module.parent.mkdir(parents=True)
    module.touch()
    monkeypatch.setenv(env.STORE, str(tmp_path / "store"))
    monkeypatch.delenv(env.SGLANG_CONFIG_DIR, raising=False)
    return SglangInstallation("0.5.23", tmp_path / "sglang", "3.7.1")


def test_the_users_tables_come_before_the_shipped_ones_and_those_before_the_engines(
    engine: SglangInstallation, tmp_path: Path
) -> None:
    tuned = package_data.folder("tuned_configs")
    assert tuned is not None
    expected = [tmp_path / "store" / "tables" / "sglang", tuned / "configs", engine.configs_root]
    assert [table_dir.root for table_dir in table_dirs(engine)] == expected


def test_only_the_last_place_is_read_by_the_engine_itself(engine: SglangInstallation) -> None:
    assert [table_dir.is_engines for table_dir in table_dirs(engine)] == [False, False, True]


def test_without_shipped_tables_the_others_are_left(
    engine: SglangInstallation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package_data, "folder", lambda _: None)
    assert [table_dir.name for table_dir in table_dirs(engine)] == ["your", "the engine's"]


def test_a_folder_that_the_user_names_to_the_engine_takes_the_place_of_its_own_and_is_asked_for(
    engine: SglangInstallation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.SGLANG_CONFIG_DIR, str(tmp_path / "named"))
    last = table_dirs(engine)[-1]
    assert (last.root, last.is_engines, last.is_asked_for) == (tmp_path / "named" / "configs", True, True)


def test_our_own_overlay_is_not_what_a_user_asks_for(
    engine: SglangInstallation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.SGLANG_CONFIG_DIR, str(directory.overlay_folder(engine)))
    assert not table_dirs(engine)[-1].is_asked_for


@pytest.mark.parametrize("named", ["", "/somewhere"])
def test_a_user_without_a_home_has_the_other_places(
    engine: SglangInstallation, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(_: int) -> Any:
        raise KeyError("no such user")

    for variable in (env.STORE, "XDG_DATA_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(env.SGLANG_CONFIG_DIR, named)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert [table_dir.name for table_dir in table_dirs(engine)] == ["the shipped", "the engine's"]
