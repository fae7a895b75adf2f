"""An overlay: the engine's own tables by links, ours in the running Triton's folder, safe for every release."""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext import env, package_data
from sglang_moe_ext.cli import main, overlay
from sglang_moe_ext.core import EngineError, Origin, StoreError, Table, TableError, TableKey, TileConfig
from sglang_moe_ext.engines import table_names
from sglang_moe_ext.engines.lookup_probe import LookupRequest
from sglang_moe_ext.engines.sglang import installation, lookup_probe, overlay_tables, support
from sglang_moe_ext.engines.sglang import overlay as overlays
from sglang_moe_ext.engines.sglang import table_names as sglang_table_names
from sglang_moe_ext.engines.sglang.installation import SglangInstallation
from sglang_moe_ext.engines.sglang.overlay_tables import Sources
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.models import parse_shape
from sglang_moe_ext.tables import config_table, provenance
from sglang_moe_ext.tables.merge import StoredTable
from sglang_moe_ext.tables.provenance import Provenance, ProvenanceEntry, TuningRun
from sglang_moe_ext.tuning import install_target
from tests.engines.installed import ENGINES_DIR, REPO_ROOT
from tests.engines.sglang.test_source_patch import VERSIONS, unpacked

pytestmark = pytest.mark.usefixtures("forked_engines")

RUNNING = "triton_3_7_1"
OLD, NEW = (0, 5, 12), (0, 5, 23)
GPU = "NVIDIA_H200"
UP = f"E=8,N=512,device_name={GPU}.json"
DOWN = f"E=8,N=512,device_name={GPU}_down.json"
SMALL, LARGE = TileConfig(16, 64, 64, 1, 4, 3), TileConfig(64, 128, 64, 8, 4, 3)
RUN = TuningRun("", "", "", "", "", "", None, None, None, None, 0, "")


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources([tmp_path / "users", tmp_path / "shipped"], tmp_path / "engines")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "overlay" / "configs" / RUNNING


def write(root: Path, triton: str, name: str, table: Table, origin: Origin | None = "measured") -> Path:
    path = root / triton / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config_table.to_json(table))
    if origin is not None:
        known = Provenance({m: ProvenanceEntry(origin, RUN) for m in table})
        provenance.sidecar(path).write_text(provenance.to_json(known))
    return path


def test_ours_lies_under_the_running_triton_whatever_triton_it_is_for(sources: Sources, folder: Path) -> None:
    write(sources.ours[0], "triton_3_6_0", UP, {64: SMALL})
    assert overlay_tables.put(UP, sources, folder, NEW)[folder / UP] is None
    assert config_table.read(folder / UP) == {64: SMALL}


def test_the_users_comes_before_the_shipped_one(sources: Sources, folder: Path) -> None:
    write(sources.ours[0], RUNNING, UP, {64: LARGE})
    write(sources.ours[1], RUNNING, UP, {64: SMALL})
    overlay_tables.put(UP, sources, folder, NEW)
    assert config_table.read(folder / UP) == {64: LARGE}


def test_the_running_tritons_comes_before_the_users_of_another(sources: Sources, folder: Path) -> None:
    write(sources.ours[0], "triton_3_6_0", UP, {64: LARGE})
    write(sources.ours[1], RUNNING, UP, {64: SMALL})
    overlay_tables.put(UP, sources, folder, NEW)
    assert config_table.read(folder / UP) == {64: SMALL}


def test_a_measured_one_of_another_triton_comes_before_a_prediction(sources: Sources, folder: Path) -> None:
    write(sources.ours[0], RUNNING, UP, {64: LARGE}, "predicted")
    write(sources.ours[1], "triton_3_5_1", UP, {64: SMALL})
    overlay_tables.put(UP, sources, folder, NEW)
    assert config_table.read(folder / UP) == {64: SMALL}


@pytest.mark.parametrize(
    ("ours", "theirs", "origin"),
    [("triton_3_6_0", RUNNING, "measured"), (RUNNING, "triton_3_6_0", "predicted")],
    ids=["another Triton's", "a prediction"],
)
def test_ours_does_not_hide_a_better_one_of_the_engine(
    ours: str, theirs: str, origin: Origin, sources: Sources, folder: Path
) -> None:
    write(sources.ours[0], ours, UP, {64: LARGE}, origin)
    best = write(sources.engines, theirs, UP, {64: SMALL}, origin=None)
    assert overlay_tables.put(UP, sources, folder, NEW) == {folder / UP: f"{best} comes first"}
    assert not (folder / UP).exists()


def test_of_two_other_tritons_the_newer_comes_first(sources: Sources, folder: Path) -> None:
    write(sources.ours[0], "triton_3_10_0", UP, {64: LARGE})
    write(sources.ours[0], "triton_3_9_0", UP, {64: SMALL})
    overlay_tables.put(UP, sources, folder, NEW)
    assert config_table.read(folder / UP) == {64: LARGE}


def test_what_the_engine_has_for_other_batch_sizes_stays(sources: Sources, folder: Path) -> None:
    write(sources.ours[0], RUNNING, UP, {64: LARGE})
    theirs = write(sources.engines, RUNNING, UP, {64: SMALL, 4096: SMALL}, origin=None)
    folder.mkdir(parents=True)
    (folder / UP).symlink_to(theirs)
    overlay_tables.put(UP, sources, folder, NEW)
    assert config_table.read(folder / UP) == {64: LARGE, 4096: SMALL}
    assert config_table.read(theirs) == {64: SMALL, 4096: SMALL}


def test_a_down_table_of_the_engine_does_not_meet_our_up_table(sources: Sources, folder: Path) -> None:
    write(sources.ours[0], RUNNING, UP, {64: LARGE})
    write(sources.engines, "triton_3_6_0", DOWN, {64: SMALL}, origin=None)
    overlay_tables.put(UP, sources, folder, OLD)
    assert config_table.read(folder / DOWN) == {64: LARGE}


def test_a_broken_table_of_ours_is_passed_over_for_the_next(sources: Sources, folder: Path) -> None:
    write(sources.ours[0], RUNNING, UP, {64: LARGE}).write_text("{")
    write(sources.ours[1], RUNNING, UP, {64: SMALL})
    overlay_tables.put(UP, sources, folder, NEW)
    assert config_table.read(folder / UP) == {64: SMALL}


def test_a_broken_table_alone_says_what_is_wrong(sources: Sources, folder: Path) -> None:
    write(sources.ours[0], RUNNING, UP, {64: LARGE}).write_text("{")
    with pytest.raises(TableError, match="is not valid JSON"):
        overlay_tables.put(UP, sources, folder, NEW)


def test_folders_that_no_release_of_triton_names_are_not_looked_at(sources: Sources) -> None:
    write(sources.ours[0], "triton_3_7_1+git", UP, {64: LARGE})
    assert overlay_tables.layers(sources) == []


tiles = st.builds(
    TileConfig,
    st.sampled_from((16, 32, 64, 128)),
    st.just(64),
    st.just(64),
    st.just(1),
    st.just(4),
    st.just(3),
    st.booleans(),
)
any_table = st.dictionaries(st.integers(1, 9000), tiles, min_size=1, max_size=6)
SUFFIXES = ("", ",dtype=fp8_w8a8", ",dtype=fp8_w8a8,block_shape=[128, 128]", ",dtype=fp8_w8a8,per_channel_quant=True")
MORE = (",dtype=int8_w8a8,per_channel_quant=True", ",dtype=int8_w8a16", ",dtype=int4_w4a16")


@given(up=any_table, down=st.none() | any_table, engines=st.none() | any_table, suffix=st.sampled_from(SUFFIXES + MORE))
@pytest.mark.parametrize("version", [OLD, NEW], ids=str)
def test_whatever_is_ours_the_engine_finds_safe_pairs(
    tmp_path_factory: pytest.TempPathFactory,
    version: tuple[int, int, int],
    up: Table,
    down: Table | None,
    engines: Table | None,
    suffix: str,
) -> None:
    root = tmp_path_factory.mktemp("overlay")
    sources, folder = Sources([root / "users"], root / "engines"), root / "configs" / RUNNING
    up_name, down_name = UP.replace(".json", f"{suffix}.json"), UP.replace(".json", f"{suffix}_down.json")
    write(sources.ours[0], RUNNING, up_name, up)
    if down is not None:
        write(sources.ours[0], RUNNING, down_name, down)
    if engines is not None:
        write(sources.engines, "triton_3_6_0", down_name, engines, origin=None)
    assert set(overlay_tables.put(up_name, sources, folder, version).values()) == {None}
    found_up, found_down = config_table.read(folder / up_name), config_table.read(folder / down_name)
    for m in (1, 17, 64, 300, 5000, 100_000, *up, *(down or ())):
        up_block, down_block = (table[config_table.nearest(table, m)].block_m for table in (found_up, found_down))
        assert up_block == down_block
    if version == OLD:
        assert not any(config.use_tma for config in found_up.values())
    if suffix not in ("", SUFFIXES[2]):
        assert not any(config.use_tma for config in found_down.values())


@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
def test_tma_stays_where_it_is_right(down: bool) -> None:
    stored = StoredTable({64: replace(LARGE, use_tma=True)}, None)
    assert overlay_tables.safe(stored, TableKey(8, 512, GPU, down=down), NEW) == stored


def test_up_tma_is_taken_out_up_to_the_last_release_that_crashes_on_it() -> None:
    stored, key = StoredTable({64: replace(LARGE, use_tma=True)}, None), TableKey(8, 512, GPU)
    assert overlay_tables.safe(stored, key, (0, 5, 17)).table == {64: LARGE}
    assert overlay_tables.safe(stored, key, support.FIRST_WITH_UP_TMA).table == stored.table


@functools.cache
def own_tables(version: str) -> dict[str, tuple[Path, Table]]:
    """The engine's own, those whose names some GPU could ask for."""
    found: dict[str, tuple[Path, Table]] = {}
    for path in unpacked(version).configs_root.glob("triton_*/*.json"):
        if "device_name=," not in path.name:
            found[f"{path.parent.name}/{path.name}"] = path, config_table.read(path)
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_the_engines_own_tables_are_safe_as_they_are(version: str) -> None:
    release = installation.parse_version(version)
    own = own_tables(version)
    for name, (path, table) in own.items():
        key = table_names.parse(path.name)
        assert overlay_tables.safe(StoredTable(table, None), key, release).table == table, name
        if key.down:
            _, up = own[name.replace("_down.json", ".json")]
            for m in sorted({*up, *table}):
                assert up[config_table.nearest(up, m)].block_m == table[config_table.nearest(table, m)].block_m, name


@pytest.mark.parametrize("version", VERSIONS)
def test_every_table_of_the_engine_is_linked_and_nothing_else(version: str, tmp_path: Path) -> None:
    configs = unpacked(version).configs_root
    overlays.build(tmp_path, configs)
    linked = {path.relative_to(tmp_path / "configs"): path.resolve() for path in (tmp_path / "configs").rglob("*.json")}
    assert linked == {path.relative_to(configs): path.resolve() for path in configs.glob("triton_*/*.json")}
    assert all(sglang_table_names.is_version_folder(path.name) for path in (tmp_path / "configs").iterdir())


def small_engine(root: Path) -> Path:
    write(root / "configs", RUNNING, UP, {64: SMALL}, origin=None)
    return root / "configs"


def test_what_is_ours_stays_when_an_overlay_is_built_again(tmp_path: Path) -> None:
    write(tmp_path / "overlay" / "configs", RUNNING, UP, {64: LARGE})
    overlays.build(tmp_path / "overlay", small_engine(tmp_path / "engine"))
    assert config_table.read(tmp_path / "overlay" / "configs" / RUNNING / UP) == {64: LARGE}


def test_links_into_an_engine_that_is_gone_are_replaced(tmp_path: Path) -> None:
    overlays.build(tmp_path / "overlay", small_engine(tmp_path / "old"))
    write(tmp_path / "old" / "configs", RUNNING, DOWN, {64: SMALL}, origin=None)
    overlays.build(tmp_path / "overlay", tmp_path / "old" / "configs")
    (tmp_path / "old").rename(tmp_path / "removed")
    overlays.build(tmp_path / "overlay", small_engine(tmp_path / "new"))
    assert [path.name for path in (tmp_path / "overlay" / "configs" / RUNNING).iterdir()] == [UP]
    assert config_table.read(tmp_path / "overlay" / "configs" / RUNNING / UP) == {64: SMALL}


def test_many_may_build_one_overlay_at_a_time(tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def build() -> None:
        try:
            overlays.build(tmp_path, unpacked("0.5.23").configs_root)
        except StoreError as error:
            failed.append(error)

    threads = [threading.Thread(target=build) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_a_folder_that_would_end_the_engines_lookup_is_named(tmp_path: Path) -> None:
    (tmp_path / "overlay" / "configs" / "triton_3_7_1+git").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"triton_3_7_1\+git is named after no release of Triton"):
        overlays.build(tmp_path / "overlay", small_engine(tmp_path / "engine"))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SglangInstallation:
    """The real 0.5.15 with Triton 3.7.1, and a store of the user's own."""
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "a store"))
    monkeypatch.delenv(env.SGLANG_CONFIG_DIR, raising=False)
    engine = replace(unpacked("0.5.15"), triton="3.7.1")
    monkeypatch.setattr(installation, "find", lambda: engine)
    monkeypatch.setattr(installation, "running_triton", lambda: engine.triton)
    return engine


def said(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], dict[str, Any]]:
    assert main.main(["overlay", "--json"]) == 0
    printed = capsys.readouterr()
    return printed.err.splitlines(), json.loads(printed.out)


def test_the_line_that_is_printed_sets_the_variable_in_a_shell(
    engine: SglangInstallation, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, document = said(capsys)
    (export,) = (line for line in lines if line.startswith("export "))
    shell = f'{export}; printf %s "${env.SGLANG_CONFIG_DIR}"'
    told = subprocess.run(["sh", "-c", shell], check=True, capture_output=True, text=True).stdout
    assert document["environment"] == {env.SGLANG_CONFIG_DIR: told}
    assert Path(told, "configs", RUNNING).is_dir()


def test_built_twice_an_overlay_is_the_same(engine: SglangInstallation, capsys: pytest.CaptureFixture[str]) -> None:
    first = said(capsys)[1]
    before = {path: path.read_bytes() for path in overlays.overlay_folder(engine).rglob("*.json")}
    assert said(capsys)[1] == first
    assert {path: path.read_bytes() for path in overlays.overlay_folder(engine).rglob("*.json")} == before


def test_tuning_writes_into_the_same_overlay(engine: SglangInstallation) -> None:
    destination = install_target.choose_for_sglang("overlay", None, engine, "3.7.1")
    assert destination is not None
    assert destination.folder == overlays.overlay_folder(engine) / "configs" / RUNNING


def test_a_variable_that_names_another_folder_is_not_overruled(
    engine: SglangInstallation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.SGLANG_CONFIG_DIR, "/mine")
    with pytest.raises(EngineError, match=r"SGLANG_MOE_CONFIG_DIR is /mine, .*unset it"):
        overlay.run(argparse.Namespace())


def test_a_variable_that_names_the_overlay_is_as_it_should_be(
    engine: SglangInstallation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(env.SGLANG_CONFIG_DIR, str(overlays.overlay_folder(engine)))
    assert said(capsys)[0][-1] == f"export {env.SGLANG_CONFIG_DIR}={shlex.quote(str(overlays.overlay_folder(engine)))}"


def test_a_triton_of_its_own_build_gets_no_overlay(engine: SglangInstallation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "running_triton", lambda: "3.7.1+git1234")
    with pytest.raises(EngineError, match="is a build of its own"):
        overlay.run(argparse.Namespace())
    assert not overlays.overlay_folder(engine).exists()


def test_without_an_engine_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "find", lambda: None)
    with pytest.raises(EngineError, match="run overlay where the server runs"):
        overlay.run(argparse.Namespace())


_COMMAND = [sys.executable, "-m", "sglang_moe_ext", "overlay", "--json"]


@pytest.mark.parametrize("version", ["0.5.8", "0.5.10", "0.5.15", "0.5.23"])
def test_the_real_engine_takes_a_shipped_table_of_another_triton(version: str, tmp_path: Path) -> None:
    site = ENGINES_DIR / "sglang" / version
    environment = {**os.environ, "PYTHONPATH": f"{REPO_ROOT}{os.pathsep}{site}", "SGLANG_MOE_EXT_STORE": str(tmp_path)}
    environment.pop(env.SGLANG_CONFIG_DIR, None)
    done = subprocess.run(_COMMAND, env=environment, capture_output=True, text=True, check=True)
    variables = json.loads(done.stdout)["environment"]

    tuned = package_data.folder("tuned_configs")
    assert tuned is not None
    name = "E=65,N=1536,device_name=NVIDIA_H200.json"
    stored = StoredTable(config_table.read(tuned / "configs" / "triton_3_6_0" / name), None)
    expected = overlay_tables.safe(stored, table_names.parse(name), installation.parse_version(version)).table
    question = LookupRequest(parse_shape("E=65,N=1536,K=2048,topk=5,dtype=bfloat16"), [64], find_gpu("NVIDIA H200"))
    answer = lookup_probe.ALONE.ask(question, environment | variables)
    folder = Path(variables[env.SGLANG_CONFIG_DIR], "configs", sglang_table_names.version_folder(answer.triton))
    assert folder / name in answer.files
    assert answer.up[64] == expected[config_table.nearest(expected, 64)]
