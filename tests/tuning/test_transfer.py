"""From the journal of one engine to a table for the other: recordings of an H200, made-up ones, and the command."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext.cli import main
from sglang_moe_ext.core import PROJECTIONS, CompileKey, MoEShape, Quantization, StoreError, TileConfig
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.tables import config_table, provenance
from sglang_moe_ext.tuning import transfer
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchGemm,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
    GemmTimes,
)
from sglang_moe_ext.tuning.run.journal import Journal
from sglang_moe_ext.tuning.run.journal_reader import Recording
from sglang_moe_ext.tuning.transfer import JournalSource
from tests.tuning.recorded_runs import LAYERS, path_of, recorded

GLM, QWEN = "glm_4_7_flash_bf16", "qwen3_30b_a3b_fp8_block"
H200 = "NVIDIA H200"
VLLM_KERNEL = "vLLM 0.25.1's own kernel, Triton 3.6.0"
FAST, SLOW = CompileKey(16, 64, 64, 4, 3), CompileKey(64, 64, 64, 4, 3)
WITH_TMA = replace(FAST, use_tma=True)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def source(shape: MoEShape, engine: EngineName = "sglang") -> JournalSource:
    return JournalSource(engine, "0.5.15", "3.6.0", shape, H200)


def screens(times: dict[CompileKey, float], tokens: int = 64) -> list[tuple[BenchRequest, BenchResult]]:
    """Both GEMMs timed alike, with GROUP_SIZE_M 1."""
    return [
        (BenchGemm(tokens, projection, key, (1,), 2), GemmTimes(((us, us),)))
        for projection in PROJECTIONS
        for key, us in times.items()
    ]


def recording(*results: tuple[BenchRequest, BenchResult]) -> Recording:
    return Recording({}, dict(enumerate(results)), is_finished=True, whole_bytes=0)


def chosen(*results: tuple[BenchRequest, BenchResult], shape: MoEShape = LAYERS[GLM]) -> dict[int, TileConfig]:
    found = transfer.best_configs(recording(*results), source(shape), "vllm")
    return {m: of.config for m, of in found.items()}


@pytest.mark.parametrize("layer", [GLM, QWEN])
def test_every_m_that_was_measured_gets_an_entry(layer: str) -> None:
    journal = recorded(layer)
    measured = {request.tokens for request, _ in journal.results.values()}
    assert set(transfer.best_configs(journal, transfer.source_of(journal), "vllm")) == measured


@pytest.mark.parametrize("layer", [GLM, QWEN])
def test_no_entry_for_vllm_has_tma(layer: str) -> None:
    found = transfer.best_configs(recorded(layer), transfer.source_of(recorded(layer)), "vllm")
    assert not any(of.config.use_tma for of in found.values())


def test_a_journal_says_whose_it_is() -> None:
    assert transfer.source_of(recorded(GLM)) == source(LAYERS[GLM])


def test_a_journal_of_nothing_that_was_measured_is_refused() -> None:
    with pytest.raises(StoreError, match="names no engine and layer"):
        transfer.source_of(Recording({"kernel": "our own kernel, Triton 3.6.0"}, {}, False, 0))


def test_the_smallest_sum_of_both_gemms_wins() -> None:
    assert chosen(*screens({FAST: 3.0, SLOW: 5.0})) == {64: FAST.with_group(1)}


def test_a_faster_one_by_tma_is_passed_over() -> None:
    assert chosen(*screens({WITH_TMA: 1.0, SLOW: 5.0})) == {64: SLOW.with_group(1)}


def test_what_was_found_wrong_is_passed_over() -> None:
    wrong = FAST.with_group(1)
    check: tuple[BenchRequest, BenchResult] = (CheckAccuracy(64, {"up": wrong, "down": wrong}), Accuracy(0.5))
    assert chosen(*screens({FAST: 3.0, SLOW: 5.0}), check) == {64: SLOW.with_group(1)}


def test_a_longer_screen_of_a_configuration_counts() -> None:
    again = [(BenchGemm(64, it, FAST, (1,), 4), GemmTimes(((9.0,) * 4,))) for it in PROJECTIONS]
    assert chosen(*screens({FAST: 3.0, SLOW: 5.0}), *again) == {64: SLOW.with_group(1)}


def test_a_tile_that_reaches_beyond_a_block_of_scales_is_written_as_vllm_runs_it() -> None:
    shape = MoEShape(8, 64, 64, 2, Quantization("fp8_w8a8", (32, 32)))
    assert chosen(*screens({FAST: 3.0}), shape=shape)[64].block_k == 32


@given(
    shape=st.builds(MoEShape, st.integers(9, 300), st.integers(1, 4096), st.integers(1, 8192), st.integers(3, 8)),
    fused=st.integers(0, 2),
)
def test_a_layer_comes_back_from_the_other_engine_as_it_was(shape: MoEShape, fused: int) -> None:
    ours = replace(shape, experts=shape.experts + fused, top_k=shape.top_k + fused, fused_shared=fused)
    there = transfer.shape_in("vllm", source(ours), 0)
    assert there == shape
    assert transfer.shape_in("sglang", source(there, "vllm"), fused) == ours


def exported(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main.main(("export", "--json", *arguments)) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_a_journal_of_sglang_becomes_a_table_of_vllm(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "E=64,N=1536,device_name=NVIDIA_H200.json"
    done = exported(capsys, str(path_of(GLM)), "--engine", "vllm", "--save-dir", str(tmp_path / "mine"))
    assert done["written"] == [str(tmp_path / "mine" / name), str(store / "tables/vllm/triton_3_6_0" / name)]
    document = json.loads((tmp_path / "mine" / name).read_text())
    assert document.pop("triton_version") == "3.6.0"
    assert set(document["64"]) >= {"BLOCK_SIZE_M", "SPLIT_K"} and "USE_TMA" not in document["64"]


def test_an_entry_says_that_it_was_transferred_and_from_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (first, *_) = exported(capsys, str(path_of(GLM)), "--engine", "vllm")["written"]
    known = provenance.read(Path(first))
    assert known is not None
    assert {entry.origin for entry in known.entries.values()} == {"transferred"}
    assert {entry.run.engine for entry in known.entries.values()} == {"sglang 0.5.15"}
    assert ",K=2048,topk=4," in known.entries[64].run.shape


def vllm_journal(folder: Path, shape: MoEShape) -> Path:
    path = folder / "journal.jsonl"
    stated = {"shape": str(shape), "ep": 1, "fused_shared": 0, "gpu": H200, "kernel": VLLM_KERNEL, "seed": 0}
    journal = Journal.create(path, stated)
    for request, result in screens({FAST: 3.0, SLOW: 5.0}):
        journal.record(request, result)
    journal.finish()
    journal.close()
    return path


def test_a_journal_of_vllm_becomes_a_table_of_sglang(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = vllm_journal(tmp_path, MoEShape(64, 1536, 2048, 4))
    done = exported(capsys, str(path), "--engine", "sglang", "--fused-shared-experts", "1")
    written = store / "tables/sglang/triton_3_6_0/E=65,N=1536,device_name=NVIDIA_H200.json"
    assert done["written"] == [str(written)]
    assert list(json.loads(written.read_text())) == ["64"]
    assert config_table.read(written) == {64: FAST.with_group(1)}


def test_an_engines_own_journal_is_not_transferred(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(("export", str(path_of(GLM)), "--engine", "sglang")) == 1
    assert "was measured in SGLang itself" in capsys.readouterr().err


def test_without_a_run_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(("export", "--engine", "vllm")) == 1
    assert "there is no run" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ENGINES)
@given(
    table=st.dictionaries(
        st.integers(1, 10**6),
        st.builds(
            TileConfig,
            *(st.sampled_from([16, 32, 64, 128, 256]),) * 3,
            st.integers(1, 64),
            st.sampled_from([4, 8]),
            st.integers(1, 5),
        ),
        min_size=1,
    )
)
def test_a_table_is_read_as_it_was_written_in_either_dialect(engine: EngineName, table: dict[int, TileConfig]) -> None:
    assert config_table.parse(json.loads(ENGINES[engine].table_text(table, "3.6.0"))) == table


ODD = {
    "a seed that is a text": ({"seed": "first"}, "seed of 'first'"),
    "a seed that is a fraction": ({"seed": 0.5}, "seed of 0.5"),
    "a GPU with a NUL": ({"gpu": "NVIDIA H200\0"}, "names no GPU"),
    "a GPU that is a path": ({"gpu": "../../H200"}, "names no GPU"),
    "a GPU that goes on for ever": ({"gpu": "H" * 10**6}, "names no GPU"),
    "no GPU": ({"gpu": None}, "names no GPU"),
    "a shape that is a number": ({"shape": 5}, ""),
    "a kernel that colours the terminal": ({"kernel": "\x1b[31mSGLang 1's own kernel, Triton 2"}, "names no engine"),
}


@pytest.mark.parametrize(("fields", "said"), ODD.values(), ids=ODD.keys())
def test_a_journal_with_odd_fields_is_one_line(
    fields: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stated = {**recorded(GLM).circumstances, **fields}
    (tmp_path / "journal.jsonl").write_text(json.dumps({"format": 1, "circumstances": stated}) + "\n")
    assert main.main(("export", str(tmp_path), "--engine", "vllm")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and line.isprintable() and len(line) < 500


def test_a_journal_that_is_a_pipe_is_one_line_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "journal.jsonl")
    assert main.main(("export", str(tmp_path), "--engine", "vllm")) == 1
    assert "no regular file" in capsys.readouterr().err
