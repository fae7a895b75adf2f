"""The stock of tables: listed, checked, imported, installed and removed, by the commands that do it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.cli import main
from sglang_moe_ext.core import MoEShape, Quantization, Table, TileConfig
from sglang_moe_ext.engines import installed_engines
from sglang_moe_ext.engines.sglang import installation as sglang
from sglang_moe_ext.engines.sglang.installation import SglangInstallation
from sglang_moe_ext.engines.vllm import installation as vllm
from sglang_moe_ext.engines.vllm.installation import VllmInstallation
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.stock import given_table
from sglang_moe_ext.tables import config_table, provenance
from sglang_moe_ext.tables.provenance import Provenance, ProvenanceEntry, TuningRun

TRITON = "3.7.1"
SMALL, LARGE = TileConfig(16, 64, 64, 1, 4, 3), TileConfig(128, 256, 128, 16, 8, 4)
SHAPE = "E=128,N=768,K=2048,topk=8,dtype=bfloat16"
NAME = "E=128,N=768,device_name=NVIDIA_H200.json"
FP8 = "E=256,N=512,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128].json"
RUN = TuningRun("", "", "Qwen3-30B-A3B", SHAPE, "NVIDIA H200", "k", None, TRITON, None, None, 0, "0")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of the user's own, no GPU, no engine, and nothing that this package ships."""
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for variable in ("SGLANG_MOE_CONFIG_DIR", "VLLM_TUNED_CONFIG_FOLDER"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(specs, "detect", lambda: None)
    monkeypatch.setattr(sglang, "find", lambda: None)
    monkeypatch.setattr(vllm, "find", lambda: None)
    monkeypatch.setattr(installed_engines, "running_triton", lambda: TRITON)
    monkeypatch.setattr("sglang_moe_ext.package_data.folder", lambda name: None)
    return tmp_path / "store"


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An SGLang of which only the module of the lookup is there; gives the folder of its tables for the Triton here."""
    lookup = tmp_path / "sglang/srt/layers/moe/moe_runner/triton_utils/fused_moe_triton_config.py"
    folder = lookup.parent / "configs" / "triton_3_7_1"
    folder.mkdir(parents=True)
    lookup.touch()
    monkeypatch.setattr(sglang, "find", lambda: SglangInstallation("0.5.23", tmp_path / "sglang", TRITON))
    return folder


@pytest.fixture
def other_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A vLLM of which only the folder of tables is there."""
    engine = VllmInstallation("0.33.0", tmp_path / "vllm", TRITON)
    engine.configs_folder.mkdir(parents=True)
    monkeypatch.setattr(vllm, "find", lambda: engine)
    return engine.configs_folder


def put(path: Path, table: Table, origin: str | None = None, run: TuningRun = RUN, **figures: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config_table.to_json(table))
    if origin is not None:
        entries = {m: ProvenanceEntry(origin, run, figures) for m in table}  # type: ignore[arg-type]
        provenance.sidecar(path).write_text(provenance.to_json(Provenance(entries)))
    return path


Said = Callable[..., Mapping[str, Any]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """The document of a command that ends well, or with `status`."""

    def run(*arguments: str, status: int = 0) -> Mapping[str, Any]:
        assert main.main([*arguments, "--json"]) == status
        document: Mapping[str, Any] = json.loads(capsys.readouterr().out)
        return document

    return run


class TestList:
    def test_a_table_is_listed_with_its_origin_and_gain(self, store: Path, said: Said) -> None:
        put(store / "tables/sglang/triton_3_7_1" / NAME, {64: SMALL, 128: SMALL}, "measured", gain=1.5)
        (one,) = said("list", "--engine", "sglang")["tables"]
        assert (one["model"], one["triton"], one["gpu"]) == ("Qwen3-30B-A3B", TRITON, "NVIDIA_H200")
        assert (one["origins"], one["gain"]) == ({"measured": 2}, 1.5)

    def test_a_measured_table_shadows_a_predicted_one(self, store: Path, said: Said) -> None:
        first = put(store / "tables/sglang/triton_3_6_0" / NAME, {64: SMALL}, "measured", replace(RUN, triton="3.6.0"))
        put(store / "tables/sglang/triton_3_7_1" / NAME, {64: LARGE}, "predicted")
        by_triton = {it["triton"]: it for it in said("list", "--engine", "sglang")["tables"]}
        assert (by_triton["3.6.0"]["served"], by_triton["3.6.0"]["shadowed_by"]) == (1, [])
        assert (by_triton["3.7.1"]["served"], by_triton["3.7.1"]["shadowed_by"]) == (0, [str(first)])

    def test_the_engines_own_table_shadows_a_predicted_one(self, engine: Path, store: Path, said: Said) -> None:
        put(engine / NAME, {64: SMALL})
        put(store / "tables/sglang/triton_3_7_1" / NAME, {64: LARGE}, "predicted")
        (one,) = said("list")["tables"]
        assert one["shadowed_by"] == ["the engine's own table"]

    def test_a_copy_in_the_engine_is_not_shadowed_by_the_same_table_of_the_store(
        self, engine: Path, store: Path, said: Said
    ) -> None:
        for folder in (engine, store / "tables/sglang/triton_3_7_1"):
            put(folder / NAME, {64: SMALL}, "measured")
        assert [(it["served"], it["shadowed_by"]) for it in said("list")["tables"]] == [(1, []), (1, [])]

    def test_tables_of_the_engine_are_listed_on_request(self, engine: Path, said: Said) -> None:
        put(engine / NAME, {64: SMALL})
        assert said("list")["tables"] == []
        (one,) = said("list", "--all")["tables"]
        assert (one["where"], one["served"]) == ("the engine's", None)

    def test_a_broken_table_is_named_with_its_fault(self, store: Path, said: Said) -> None:
        broken = put(store / "tables/sglang/triton_3_7_1" / NAME, {64: SMALL})
        broken.write_text('{"64": ')
        (one,) = said("list", "--engine", "sglang")["broken"]
        assert one["file"] == str(broken) and "not valid JSON" in one["why"]

    def test_only_tables_of_the_named_gpu_are_listed(self, store: Path, said: Said) -> None:
        put(store / "tables/sglang/triton_3_7_1" / NAME, {64: SMALL}, "measured")
        assert said("list", "--gpu", "RTX_5090")["tables"] == []
        assert len(said("list", "--gpu", "H200", "--engine", "sglang")["tables"]) == 1

    def test_an_engine_that_is_here_alone_is_meant(self, other_engine: Path, store: Path, said: Said) -> None:
        put(store / "tables/sglang/triton_3_7_1" / NAME, {64: SMALL}, "measured")
        put(store / "tables/vllm/triton_3_7_1" / NAME, {64: SMALL}, "measured")
        assert [it["engine"] for it in said("list")["tables"]] == ["vllm"]

    def test_people_see_where_each_table_lies(self, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
        put(store / "tables/sglang/triton_3_7_1" / NAME, {64: SMALL}, "measured", gain=1.5)
        assert main.main(["list", "--engine", "sglang"]) == 0
        printed = capsys.readouterr().out
        assert "Qwen3-30B-A3B" in printed and "1.50x" in printed and "measured 1" in printed and str(store) in printed


class TestCheck:
    FITS = ("check", "--no-compile")

    def test_a_table_that_fits_is_said_to(self, tmp_path: Path, said: Said) -> None:
        file = put(tmp_path / NAME, {64: SMALL})
        (one,) = said(*self.FITS, str(file), "--shape", SHAPE)["files"]
        assert (one["fits"], one["gpu"], one["engine"]) == (True, "NVIDIA H200", "sglang")

    def test_an_entry_too_large_for_another_gpu_is_named_with_what_would_run(self, tmp_path: Path, said: Said) -> None:
        file = put(tmp_path / NAME, {1: SMALL, 4096: LARGE})
        document = said(*self.FITS, str(file), "--shape", SHAPE, "--gpu", "RTX_5090", status=1)
        (problem,) = document["files"][0]["problems"]
        assert problem["M"] == 4096
        assert "294912 B of shared memory, and a block has 101376 B" in problem["why"]
        assert "the plugin would run" in problem["why"]

    def test_a_tile_over_several_blocks_of_scales_is_wrong(self, tmp_path: Path, said: Said) -> None:
        file = put(tmp_path / FP8, {64: replace(SMALL, block_k=256)})
        shape = "E=256,N=512,K=2048,topk=8,dtype=fp8_w8a8,block_shape=[128,128]"
        document = said(*self.FITS, str(file), "--shape", shape, status=1)
        assert "its results would be wrong" in document["files"][0]["problems"][0]["why"]

    def test_vllm_cuts_such_a_tile_itself(self, tmp_path: Path, said: Said) -> None:
        file = put(tmp_path / FP8.replace("128, 128", "128,128"), {64: replace(SMALL, block_k=256)})
        shape = "E=256,N=512,K=2048,topk=8,dtype=fp8_w8a8,block_shape=[128,128]"
        (one,) = said(*self.FITS, str(file), "--shape", shape)["files"]
        assert one["engine"] == "vllm"

    @pytest.mark.engine
    def test_the_compiler_is_asked_where_it_is_there(self, tmp_path: Path, said: Said) -> None:
        pytest.importorskip("triton")
        file = put(tmp_path / NAME, {64: SMALL})
        (one,) = said("check", str(file), "--shape", SHAPE)["files"]
        assert (one["compiled"], one["fits"]) == (True, True)

    def test_a_table_for_another_layer_is_refused(self, tmp_path: Path, said: Said) -> None:
        file = put(tmp_path / NAME, {64: SMALL})
        assert "is not for E=8" in said(*self.FITS, str(file), "--shape", "E=8,N=64,K=64,topk=2", status=1)["error"]

    def test_a_name_that_no_model_has_asks_for_the_layer(self, tmp_path: Path, said: Said) -> None:
        file = put(tmp_path / "E=7,N=33,device_name=NVIDIA_H200.json", {64: SMALL})
        assert "--shape E=7,N=33" in said(*self.FITS, str(file), status=1)["error"]


class TestImport:
    def test_a_table_goes_into_the_store_as_worth_less_than_a_measured_one(
        self, tmp_path: Path, store: Path, said: Said
    ) -> None:
        file = put(tmp_path / "triton_3_6_0" / NAME, {64: SMALL})
        done = said("import", "--no-compile", str(file), "--shape", SHAPE)
        place = store / "tables/sglang/triton_3_6_0" / NAME
        assert done["written"] == [str(place)]
        known = provenance.read(place)
        assert known is not None and known.origin(64) == "transferred"
        assert [it["origins"] for it in said("list", "--engine", "sglang")["tables"]] == [{"imported": 1}]

    def test_a_user_may_vouch_for_it(self, tmp_path: Path, store: Path, said: Said) -> None:
        file = put(tmp_path / "triton_3_6_0" / NAME, {64: SMALL})
        said("import", "--no-compile", str(file), "--shape", SHAPE, "--measured")
        known = provenance.read(store / "tables/sglang/triton_3_6_0" / NAME)
        assert known is not None and known.origin(64) == "measured"

    def test_what_its_provenance_says_stays(self, tmp_path: Path, store: Path, said: Said) -> None:
        file = put(tmp_path / NAME, {64: SMALL}, "measured", gain=1.25)
        said("import", "--no-compile", str(file))
        known = provenance.read(store / "tables/sglang/triton_3_7_1" / NAME)
        assert known is not None and known.entries[64].run == RUN
        assert known.entries[64].figures == {"gain": 1.25, "imported": 1.0}

    def test_it_never_replaces_a_measured_table(self, tmp_path: Path, store: Path, said: Said) -> None:
        mine = put(store / "tables/sglang/triton_3_7_1" / NAME, {64: LARGE}, "measured")
        file = put(tmp_path / "triton_3_7_1" / NAME, {64: SMALL})
        done = said("import", "--no-compile", str(file), "--shape", SHAPE)
        assert "a measured table already lies there" in done["kept"][str(mine)]
        assert config_table.read(mine) == {64: LARGE}

    def test_the_other_engines_spelling_is_written_as_the_engine_asks(
        self, tmp_path: Path, store: Path, said: Said
    ) -> None:
        file = put(tmp_path / "triton_3_7_1" / FP8.replace("128, 128", "128,128"), {64: SMALL})
        shape = "E=256,N=512,K=2048,topk=8,dtype=fp8_w8a8,block_shape=[128,128]"
        said("import", "--no-compile", str(file), "--shape", shape, "--engine", "sglang")
        assert (store / "tables/sglang/triton_3_7_1" / FP8).exists()

    def test_a_table_that_does_not_fit_is_refused_unless_forced(self, tmp_path: Path, store: Path, said: Said) -> None:
        file = put(tmp_path / "triton_3_7_1" / NAME.replace("H200", "GeForce_RTX_5090"), {64: LARGE})
        given = ("import", "--no-compile", str(file), "--shape", SHAPE)
        assert "nothing was imported" in said(*given, status=1)["error"]
        assert not store.exists()
        assert len(said(*given, "--force")["written"]) == 1

    def test_a_table_of_vllm_goes_to_vllms_store(self, tmp_path: Path, store: Path, said: Said) -> None:
        file = tmp_path / NAME
        file.write_text(config_table.to_json({64: SMALL}, triton_version="3.6.0", with_split_k=True))
        said("import", "--no-compile", str(file), "--shape", SHAPE)
        assert json.loads((store / "tables/vllm/triton_3_6_0" / NAME).read_text())["triton_version"] == "3.6.0"


class TestLayers:
    def test_every_layer_that_a_name_may_mean_is_named(self) -> None:
        key = given_table.table_names.parse("E=128,N=192,device_name=NVIDIA_H200.json")
        models = {model for it in given_table.fitting_layers(key, "sglang") for model in it.models}
        assert {"Qwen3-30B-A3B --tp-size 4", "Qwen3-235B-A22B --tp-size 8"} <= models

    def test_no_group_is_made_up_for_int4(self) -> None:
        shape = MoEShape(384, 2048, 7168, 8, Quantization("int4_w4a16", (0, 32)))
        key = given_table.ENGINES["sglang"].table_key(shape, "NVIDIA H200", down=False)
        assert all(it.shape.quantization.block_shape for it in given_table.fitting_layers(key, "sglang"))


class TestInstall:
    def test_a_name_in_the_other_engines_spelling_is_written_as_this_engine_asks(
        self, engine: Path, store: Path, said: Said
    ) -> None:
        run = replace(RUN, shape="E=256,N=512,K=2048,topk=8,dtype=fp8_w8a8,block_shape=[128, 128]")
        put(store / "tables/sglang/triton_3_7_1" / FP8.replace("128, 128", "128,128"), {64: SMALL}, "measured", run)
        assert said("install")["written"] == [str(engine / FP8)]

    def test_tables_for_another_triton_are_said_to_be_served(
        self, engine: Path, store: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        put(store / "tables/sglang/triton_3_6_0" / NAME, {64: SMALL}, "measured")
        assert main.main(["install"]) == 0
        printed = capsys.readouterr().out
        assert "made with Triton 3.6.0: 1 in the store" in printed
        assert "with the plugin reads them" in printed and "sglang-moe-ext tune" in printed

    def test_a_broken_table_is_named_where_it_lies(
        self, engine: Path, store: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        broken = put(store / "tables/sglang/triton_3_7_1" / NAME, {64: SMALL})
        broken.write_text("{")
        assert main.main(["install"]) == 0
        (line,) = (it for it in capsys.readouterr().out.splitlines() if "not valid JSON" in it)
        assert line.startswith(f"did not write {broken}: ")

    def test_vllm_alone_is_the_engine_that_is_meant(self, other_engine: Path, store: Path, said: Said) -> None:
        put(store / "tables/vllm/triton_3_7_1" / NAME, {64: SMALL}, "measured")
        assert said("install")["written"] == [str(other_engine / NAME)]
        assert json.loads((other_engine / NAME).read_text())["triton_version"] == TRITON

    def test_where_both_are_the_choice_is_said(
        self, engine: Path, other_engine: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main.main(["install"]) == 0
        assert "for SGLang: vLLM is installed here as well, and --engine chooses" in capsys.readouterr().out


class TestClean:
    def test_what_this_package_wrote_is_removed_and_nothing_else(
        self, engine: Path, other_engine: Path, store: Path, said: Said
    ) -> None:
        theirs = put(engine / "E=8,N=64,device_name=NVIDIA_H200.json", {64: SMALL})
        ours = [put(engine / NAME, {64: SMALL}, "predicted"), put(other_engine / NAME, {64: SMALL}, "measured")]
        mine = put(store / "tables/sglang/triton_3_7_1" / NAME, {64: SMALL}, "measured")
        assert sorted(said("clean")["removed"]) == sorted(map(str, ours))
        assert not any(path.exists() or provenance.sidecar(path).exists() for path in ours)
        assert theirs.exists() and mine.exists()

    def test_entries_of_others_in_the_same_file_stay(self, engine: Path, said: Said) -> None:
        path = put(engine / NAME, {64: SMALL, 4096: LARGE}, None)
        entries = {64: ProvenanceEntry("measured", RUN)}
        provenance.sidecar(path).write_text(provenance.to_json(Provenance(entries)))
        assert said("clean")["entries_kept"] == {str(path): [4096]}
        assert config_table.read(path) == {4096: LARGE}

    def test_an_unfinished_file_is_removed(self, engine: Path, said: Said) -> None:
        (engine / ".abc.tmp").touch()
        said("clean")
        assert not (engine / ".abc.tmp").exists()

    def test_a_dry_run_removes_nothing(self, engine: Path, store: Path, said: Said) -> None:
        path = put(engine / NAME, {64: SMALL}, "predicted")
        mine = put(store / "tables/sglang/triton_3_7_1" / NAME, {64: SMALL}, "measured")
        assert said("clean", "--dry-run", "--store")["removed"] == [str(path)]
        assert path.exists() and mine.exists()

    def test_the_store_goes_on_request(self, store: Path, said: Said) -> None:
        put(store / "tables/sglang/triton_3_7_1" / NAME, {64: SMALL}, "measured")
        assert said("clean", "--store")["folders"] == [str(store)]
        assert not store.exists()
