"""Where a vLLM server looks for tables, and in which dialect and order."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sglang_moe_ext import env
from sglang_moe_ext.core import Gpu, MoEShape, Origin, Table, TileConfig
from sglang_moe_ext.engines.sglang import table_names as sglangs
from sglang_moe_ext.engines.vllm import table_names
from sglang_moe_ext.engines.vllm.installation import VllmInstallation
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.serving import table_search, table_selection
from sglang_moe_ext.serving.table_search import TableDir
from sglang_moe_ext.serving.table_selection import Choice, EngineDefault, EngineEntry, OurEntry
from sglang_moe_ext.serving.vllm_hooks import table_dirs
from sglang_moe_ext.tables import config_table, files, provenance
from sglang_moe_ext.tables.provenance import Provenance, ProvenanceEntry
from tests.tables.generated import A_RUN

SHAPE, TRITON = MoEShape(8, 256, 512, 2), "3.7.1"
H200, H200_NVL = find_gpu("H200"), find_gpu("H200 NVL")
ENGINE = VllmInstallation("0.33.0", Path("/vllm"), TRITON)


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.STORE, str(tmp_path / "store"))
    monkeypatch.delenv(env.VLLM_CONFIG_FOLDER, raising=False)


def config(mark: int) -> TileConfig:
    """A configuration that is told from others by its GROUP_SIZE_M."""
    return TileConfig(16, 64, 64, mark, 4, 3)


def put(
    table_dir: TableDir, mark: int, origin: Origin | None, *, triton: str = TRITON, keys: tuple[int, ...] = (64,)
) -> Path:
    folder = table_dir.root if table_dir.is_flat else table_dir.root / sglangs.version_folder(triton)
    path = folder / table_dir.dialect.file_name(table_dir.dialect.key(SHAPE, H200.device_name))
    table: Table = dict.fromkeys(keys, config(mark))
    run = dataclasses.replace(A_RUN, shape=str(SHAPE), triton=triton)
    known = (
        {}
        if origin is None
        else {provenance.sidecar(path): Provenance(dict.fromkeys(table, ProvenanceEntry(origin, run)))}
    )
    files.write_together(
        {path: config_table.to_json(table), **{path: provenance.to_json(it) for path, it in known.items()}}
    )
    return path


def choice(found: list[TableDir], tokens: int = 64, gpu: Gpu = H200) -> Choice:
    return table_selection.select(table_search.search(SHAPE, gpu.device_name, gpu, TRITON, found), tokens)


@pytest.fixture
def furnished(tmp_path: Path) -> dict[str, TableDir]:
    """A place of each kind, all empty."""
    flat = TableDir("the engine's", tmp_path / "engine", is_engines=True, is_flat=True, dialect=table_names.NAMING)
    return {
        "named": dataclasses.replace(flat, name="your", root=tmp_path / "named", is_asked_for=True),
        "own": TableDir("your", tmp_path / "own", dialect=table_names.NAMING),
        "engine": flat,
        "shipped": TableDir("the shipped", tmp_path / "shipped", dialect=table_names.NAMING),
    }


def test_the_folder_that_the_user_names_comes_first_and_vllms_own_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.VLLM_CONFIG_FOLDER, str(tmp_path / "named"))
    found = table_dirs(ENGINE)
    roots = [tmp_path / "named", tmp_path / "store/tables/vllm", ENGINE.configs_folder]
    assert [table_dir.root for table_dir in found if "tuned" not in str(table_dir.root)] == roots
    assert [table_dir.is_asked_for for table_dir in found] == [True] + [False] * 3


def test_no_table_of_sglang_is_served_that_nobody_exported() -> None:
    assert {table_dir.dialect for table_dir in table_dirs(ENGINE)} == {table_names.NAMING}


def test_without_a_named_folder_the_engine_reads_its_own_alone() -> None:
    assert [table_dir.root for table_dir in table_dirs(ENGINE) if table_dir.is_engines] == [ENGINE.configs_folder]


@pytest.mark.parametrize(
    ("tables_in", "winner"),
    [
        ({"shipped": "transferred"}, "shipped"),
        ({"own": "predicted", "shipped": "transferred"}, "shipped"),
        ({"own": "transferred", "shipped": "measured"}, "shipped"),
        ({"named": "predicted", "own": "measured"}, "named"),
    ],
    ids=["nothing-else", "before-predicted", "after-measured", "named-first"],
)
def test_the_better_table_is_taken(furnished: dict[str, TableDir], tables_in: dict[str, Origin], winner: str) -> None:
    for mark, (name, origin) in enumerate(tables_in.items(), start=1):
        put(furnished[name], mark, origin)
    chosen = choice(list(furnished.values()))
    assert isinstance(chosen, OurEntry)
    assert chosen.up.group_m == 1 + list(tables_in).index(winner)


def test_a_table_that_the_engine_ships_goes_before_one_of_another_engine(furnished: dict[str, TableDir]) -> None:
    put(furnished["engine"], 1, None)
    put(furnished["own"], 2, "transferred")
    assert isinstance(choice(list(furnished.values())), EngineEntry)


def test_a_named_table_goes_before_one_of_ours_in_vllms_folder_made_with_the_running_triton(
    furnished: dict[str, TableDir],
) -> None:
    put(furnished["named"], 1, None)
    put(furnished["engine"], 2, "measured")
    assert isinstance(choice(list(furnished.values()), 4000), EngineEntry)


def test_a_flat_table_of_ours_is_for_the_triton_of_its_run(furnished: dict[str, TableDir]) -> None:
    put(furnished["named"], 1, "measured", triton="3.5.1")
    assert choice(list(furnished.values())).why.endswith("(measured, made with triton_3_5_1)")


def test_a_flat_table_of_ours_leaves_far_numbers_of_tokens_to_the_default(furnished: dict[str, TableDir]) -> None:
    put(furnished["named"], 1, "measured")
    assert isinstance(choice(list(furnished.values()), 1), EngineDefault)


def test_gpus_that_share_a_files_name_read_it_once(
    furnished: dict[str, TableDir], caplog: pytest.LogCaptureFixture
) -> None:
    put(furnished["own"], 1, "measured").write_text("{", encoding="utf-8")
    choice(list(furnished.values()), gpu=H200_NVL)
    assert len(caplog.messages) == 1


def test_the_first_table_of_all_is_the_engines_own_where_nothing_is_measured(furnished: dict[str, TableDir]) -> None:
    put(furnished["own"], 1, "predicted")
    put(furnished["engine"], 2, None)
    found = table_search.search(SHAPE, H200.device_name, H200, TRITON, list(furnished.values()), any_layer=True)
    assert table_selection.best_table(found) is None


def test_the_first_table_of_all_is_whole_whatever_layer_it_was_made_for(furnished: dict[str, TableDir]) -> None:
    put(furnished["own"], 1, "measured", keys=(1, 64, 4096))
    other = dataclasses.replace(SHAPE, hidden_size=1, top_k=1)
    found = table_search.search(other, H200.device_name, H200, TRITON, list(furnished.values()), any_layer=True)
    first = table_selection.best_table(found)
    assert first is not None
    assert list(first.up) == [1, 64, 4096]
