"""`tune --engine vllm`: what its flags mean, and the whole job against a real vLLM for a GPU that is not here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.cli import main as command_line
from sglang_moe_ext.cli import tune
from sglang_moe_ext.core import TileConfig
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.tables import config_table, merge, provenance
from sglang_moe_ext.tables.merge import RefusedTable, StoredTable
from sglang_moe_ext.tuning.request import TuneRequest
from tests.engines.installed import ENGINES_DIR, REPO_ROOT

VERSION = "0.33.0"
H200_SMEM = 232_448
NAME = "E=64,N=1536,device_name=NVIDIA_GeForce_RTX_4090.json"
GLM = ("--engine", "vllm", "--model", "GLM-4.7-Flash", "--gpu", "RTX_4090")
QWEN = ("--engine", "vllm", "--model", "Qwen3-30B-A3B", "--gpu", "H200")


pytestmark = pytest.mark.usefixtures("forked_engines")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of compiled kernels: each test after the first that tunes a layer for a GPU finds them there, as a user does."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    monkeypatch.setattr(specs, "detect", lambda: None)
    return tmp_path / "store"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A real vLLM, as the engine of this process and its children."""
    site = ENGINES_DIR / "vllm" / VERSION
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(REPO_ROOT), str(site))))
    yield


def document_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def request_of(*flags: str) -> TuneRequest:
    return tune.request_of(tune.parser().parse_args(flags), "")


def error_of(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert command_line.main(("tune", *flags)) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_the_whole_job_without_a_gpu(engine: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mine = tmp_path / "mine"  # vLLM ships a measured table of this layer: a prediction needs --force
    assert (
        command_line.main(
            (
                "tune",
                *QWEN,
                "--save-dir",
                str(mine),
                "--batch-size",
                "1",
                "64",
                "1024",
                "--tune",
                "--seed",
                "0",
                "--force",
                "--json",
            )
        )
        == 0
    )
    done = document_of(capsys)
    assert (done["origin"], done["picked_up"]) == ("predicted", True)
    assert done["environment"] == {"VLLM_TUNED_CONFIG_FOLDER": str(mine)}
    assert done["kernel"].startswith(f"vLLM {VERSION}'s own kernel")

    (table,) = (path for path in mine.iterdir() if not path.name.endswith(".provenance.json"))
    assert table.name == "E=128,N=768,device_name=NVIDIA_H200.json"
    document = json.loads(table.read_text())
    assert set(document) == {"triton_version", "1", "64", "1024"}
    known = provenance.read(table)
    assert known is not None
    assert all(entry.figures["up_smem_bytes"] <= H200_SMEM for entry in known.entries.values())
    kept = (
        tmp_path / "store" / "tables" / "vllm" / f"triton_{document['triton_version'].replace('.', '_')}" / table.name
    )
    assert kept.read_text() == table.read_text()


def test_a_table_that_the_engine_does_not_take_fails_the_command(
    engine: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = merge.put

    def put_and_lose(changes: dict[Path, StoredTable], pairs: Any, text: Any) -> dict[Path, StoredTable | RefusedTable]:
        stored = put(changes, pairs, text)
        for path in stored:
            path.unlink()
        return stored

    monkeypatch.setattr(merge, "put", put_and_lose)
    assert (
        command_line.main(("tune", *QWEN, "--save-dir", str(tmp_path / "mine"), "--batch-size", "64", "--force")) == 1
    )
    assert f"vLLM {VERSION} did not read" in capsys.readouterr().err


def test_a_prediction_is_refused_where_vllm_ships_a_measured_table(
    engine: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(("tune", *QWEN, "--batch-size", "64", "--predict")) == 1
    assert "vLLM takes a measured table for this layer" in capsys.readouterr().err


def test_a_dry_run_needs_no_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(("tune", *GLM, "--dry-run", "--batch-size", "64", "--json")) == 0
    done = document_of(capsys)
    assert done["names"] == {"vLLM": NAME}
    assert sum(done["dropped"].values()) + done["kept"] == 1920


def test_candidates_that_vllm_runs_alike_count_once(capsys: pytest.CaptureFixture[str]) -> None:
    shape = "E=128,N=768,K=2048,topk=8,dtype=fp8_w8a8,block_shape=[128,128]"
    assert (
        command_line.main(("tune", "--engine", "vllm", "--shape", shape, "--gpu", "H200", "--dry-run", "--json")) == 0
    )
    done = document_of(capsys)
    assert sum(done["dropped"].values()) + done["kept"] == 1280  # of 1,920, a third reaches beyond the block


@pytest.mark.parametrize("flag", ["--tp-size", "-tp", "--tensor-parallel-size"])
def test_every_spelling_of_the_ranks_cuts_the_columns(flag: str) -> None:
    assert request_of(*QWEN, flag, "4").shape.intermediate_size == 192


@pytest.mark.parametrize("flag", ["--enable-expert-parallel", "-enable-ep"])
def test_expert_parallelism_cuts_the_experts_and_leaves_the_columns(flag: str) -> None:
    shape = request_of(*QWEN, "-tp", "8", flag).shape
    assert (shape.experts, shape.intermediate_size, shape.ep, shape.top_k) == (16, 768, 8, 8)


def test_no_shared_expert_is_fused() -> None:
    assert request_of(*GLM).shape.experts == 64


def test_blocks_of_scales_that_sglang_refuses_to_cut_are_refined() -> None:
    model = ("--engine", "vllm", "--model", "Qwen/Qwen3-30B-A3B-FP8", "--gpu", "H200", "-tp", "4")
    assert request_of(*model).shape.quantization.block_shape == (64, 64)


def test_an_uneven_expert_parallelism_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--ep-size 2: vLLM splits experts over all 4 ranks" in error_of(capsys, *QWEN, "-tp", "4", "--ep-size", "2")


def test_the_flag_of_the_other_engine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, "--model", "Qwen3-30B-A3B", "--gpu", "H200", "--enable-expert-parallel")
    assert "--enable-expert-parallel is vLLM's flag" in line


def test_a_kernel_that_reads_no_table_is_not_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--use-deep-gemm: DeepGEMM reads no table" in error_of(capsys, *QWEN, "--use-deep-gemm")


def test_the_warning_line_of_sglang_is_no_layer_of_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--from-log: the text names no table" in error_of(capsys, "--engine", "vllm", "--from-log", "x")


SECTIONED = {
    "architectures": ["SomeForConditionalGeneration"],
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "vision": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "hidden_size": 256},
    "language": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "hidden_size": 2048,
    },
}


@pytest.fixture
def sectioned(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(SECTIONED))
    return str(tmp_path)


def test_a_section_of_the_config_is_read_alone_and_quantized_as_the_whole(sectioned: str) -> None:
    shape = request_of("--engine", "vllm", "--model", sectioned, "--model-prefix", "language", "--gpu", "H200").shape
    assert (shape.experts, shape.quantization.block_shape) == (128, (128, 128))


def test_a_section_that_is_not_there_is_named_with_those_that_are(
    sectioned: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_of(capsys, "--engine", "vllm", "--model", sectioned, "--model-prefix", "audio", "--gpu", "H200")
    assert "no section" in line and "vision, language" in line


def test_a_pair_of_tables_is_no_choice_for_one_configuration(
    engine: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specs, "detect", lambda: find_gpu("NVIDIA H200"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "NVIDIA H200")
    file = tmp_path / "mine.json"
    file.write_text(config_table.to_json({64: TileConfig(16, 32, 64, 1, 4, 3)}))
    file.with_name("mine_down.json").write_text(config_table.to_json({64: TileConfig(16, 64, 64, 1, 4, 3)}))
    line = error_of(capsys, *QWEN, "--batch-size", "64", "--cmp-configs", str(file))
    assert "has two configurations" in line and "vLLM runs both GEMMs with one" in line
