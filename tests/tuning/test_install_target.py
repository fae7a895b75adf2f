"""Where tables for vLLM go: what it reads, a folder of the user's, or the store that our plugin serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_moe_ext import env
from sglang_moe_ext.engines.vllm.installation import VllmInstallation
from sglang_moe_ext.tables import files
from sglang_moe_ext.tuning import install_target
from sglang_moe_ext.tuning.install_target import InstallTarget

TRITON = "3.6.0"


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))
    monkeypatch.delenv(env.VLLM_CONFIG_FOLDER, raising=False)
    return tmp_path / "store" / "tables" / "vllm" / "triton_3_6_0"


@pytest.fixture
def engine(tmp_path: Path) -> VllmInstallation:
    found = VllmInstallation("0.33.0", tmp_path / "site" / "vllm", TRITON)
    found.configs_folder.mkdir(parents=True)
    return found


def chosen(
    engine: VllmInstallation | None, install: install_target.Install = "engine", to: Path | None = None
) -> InstallTarget:
    found = install_target.choose_for_vllm(install, to, engine, TRITON)
    assert found is not None
    return found


def test_an_engine_that_can_be_written_gets_the_tables_beside_its_own(engine: VllmInstallation) -> None:
    assert chosen(engine) == InstallTarget(engine.configs_folder, {}, is_flat=True)


def test_a_read_only_engine_leaves_them_in_the_store_that_the_plugin_serves(
    engine: VllmInstallation, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "is_writable", lambda folder: False)
    found = chosen(engine)
    assert (found.folder, found.environment) == (store, {env.VLLM_CONFIG_FOLDER: str(store)})
    assert found.note is not None and "is read-only" in found.note


def test_an_overlay_is_the_store(engine: VllmInstallation, store: Path) -> None:
    assert chosen(engine, "overlay").folder == store


def test_a_folder_that_the_user_names_to_vllm_is_where_it_looks_first(
    engine: VllmInstallation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.VLLM_CONFIG_FOLDER, str(tmp_path / "named"))
    assert chosen(engine).folder == tmp_path / "named"


def test_a_folder_to_save_to_comes_before_all(engine: VllmInstallation, tmp_path: Path) -> None:
    found = chosen(engine, to=tmp_path / "mine")
    assert (found.folder, found.environment) == (tmp_path / "mine", {env.VLLM_CONFIG_FOLDER: str(tmp_path / "mine")})
    assert not found.is_there


@pytest.mark.parametrize("install", ["engine", "overlay", "none"])
def test_without_an_engine_the_store_alone_keeps_them(install: install_target.Install) -> None:
    assert install_target.choose_for_vllm(install, None, None, TRITON) is None


def test_who_installs_nowhere_gets_no_place(engine: VllmInstallation) -> None:
    assert install_target.choose_for_vllm("none", None, engine, TRITON) is None
