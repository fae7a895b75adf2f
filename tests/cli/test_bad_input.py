"""Each mistake gets one line that names the culprit, and exit status 1; nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_moe_ext.cli import main as command_line
from sglang_moe_ext.cli import tune
from sglang_moe_ext.core import GpuError
from sglang_moe_ext.gpu import specs

GLM = ("--model", "GLM-4.7-Flash")
RTX_4090 = ("--gpu", "RTX_4090")
DENSE = '{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128}'
SEVERAL = "Config file not found at /configs/triton_3_6_0/E=256,N=512,device_name=NVIDIA_H200.json, you can"


@pytest.fixture(autouse=True)
def no_gpu_and_an_empty_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(specs, "detect", lambda: None)
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if not line.startswith("[")]  # progress
    assert len(errors) == 1, errors
    return errors[0]


@pytest.mark.parametrize(
    ("arguments", "culprit", "hint"),
    [
        ((*RTX_4090,), "--model", "GLM-4.7-Flash"),
        (("--model", "GLM-4.7-Flsh", *RTX_4090), "GLM-4.7-Flsh", "GLM-4.7-Flash"),
        (("--model", "/nowhere/at/all", *RTX_4090), "/nowhere/at/all", "folder"),
        (GLM, "no GPU", "--gpu"),
        (("--kernel", "grouped_gemm", "--hidden-size", "4096"), "no GPU", "measured, not predicted"),
        (("--kernel", "grouped_gemm", *GLM, "--hidden-size", "4096"), "--hidden-size", "choose one"),
        (("--kernel", "grouped_gemm", "--hidden-size", "0"), "--hidden-size 0", "4096"),
        (("--kernel", "grouped_gemm", "--hidden-size", "64", "--dtype", "int4_w4a16"), "int4_w4a16", "fp8_w8a8"),
        (("--kernel", "grouped_gemm", "--hidden-size", "64", "--block-shape", "9"), "--block-shape 9", "128,128"),
        (("--kernel", "grouped_gemm", *GLM, "--gpu", "H200"), "--gpu", "leave it out"),
        (("--kernel", "grouped_gemm", *GLM, "--routing", "zipf"), "--routing", "leave it out"),
        ((*GLM, *RTX_4090, "--no-tune"), "--no-tune", "--kernel grouped_gemm"),
        ((*GLM, "--gpu", "RTX_4091"), "RTX_4091", "RTX_4090"),
        ((*GLM, *RTX_4090, "--tp", "7"), "--tp-size 7", "divides"),
        ((*GLM, *RTX_4090, "--tp", "0"), "--tp-size 0", "positive"),
        ((*GLM, *RTX_4090, "--tp", "2", "--ep", "4"), "--ep-size 4", "divisible"),
        ((*GLM, *RTX_4090, "--batch-size", "1", "-8"), "-8", "from 1"),
        ((*GLM, *RTX_4090, "--dtype", "fp7"), "fp7", "fp8_w8a8"),
        (("--model", "DeepSeek-V3", "--gpu", "A100"), "A100", "Marlin"),
        (("--shape", "E=8,N=64", *RTX_4090), "--shape", "K"),
        ((*GLM, "--shape", "E=8,N=64,K=64,topk=2", *RTX_4090), "exactly one", "--model"),
        (("--shape", "E=8,N=64,K=64,topk=2", "--tp", "4", *RTX_4090), "--tp-size", "--shape"),
        (("--shape", "E=8,N=16,K=16,topk=2", *RTX_4090), "no candidate", "tile larger than the work"),
        ((*GLM, "--dtype", "int4_w4a16", *RTX_4090), "int4_w4a16", "block_shape"),
        ((*GLM, *RTX_4090, "--output-dir", "x" * 300), "xxx", "--output-dir"),
        (("--from-log", "some other line"), "--from-log", "E="),
        (("--from-log", SEVERAL), "several models", "--model"),
        (("--from-log", "E=7,N=33,device_name=NVIDIA_H200.json"), "E=7", "--shape"),
        (("--from-log", "E=65,N=1536,device_name=Some_Card.json"), "Some Card", "torch.cuda"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_mistake_is_one_line_with_culprit_and_hint(
    arguments: tuple[str, ...], culprit: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(("tune", *arguments)) == 1
    line = one_line(capsys)
    assert line.startswith("error: ")
    assert culprit in line
    assert hint in line


@pytest.mark.parametrize(
    ("content", "culprit"),
    [(None, "no config.json"), ('{"num_experts": 8, "num_exp', "config.json"), ("[]", "config.json"), (DENSE, "dense")],
    ids=["no config.json", "truncated", "not an object", "a dense model"],
)
def test_a_folder_that_is_no_moe_model_is_named(
    content: str | None, culprit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if content is not None:
        (folder / "config.json").write_text(content)
    assert command_line.main(("tune", "--model", str(folder), *RTX_4090)) == 1
    line = one_line(capsys)
    assert str(folder) in line
    assert culprit in line


def test_a_triton_that_no_engine_reads_tables_of_is_kept_out_of_its_folders(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    triton = "3.5.0+git4da5d0a7"
    monkeypatch.setattr("sglang_moe_ext.engines.installed_engines.running_triton", lambda: triton)
    assert command_line.main(("tune", *GLM, *RTX_4090, "--output-dir", str(tmp_path / "out"))) == 1
    assert triton in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_an_unknown_gpu_here_does_not_stand_in_the_way_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_gpu_error() -> None:
        raise GpuError("'Tesla T4' has compute capability 75")

    monkeypatch.setattr(specs, "detect", raise_gpu_error)
    arguments = tune.parser().parse_args([*GLM, *RTX_4090])
    assert tune.request_of(arguments, "").gpu.device_name == "NVIDIA GeForce RTX 4090"


def test_doctor_without_an_engine_says_where_to_run_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_moe_ext.engines.sglang.installation.find", lambda: None)
    assert command_line.main(("doctor", *GLM, *RTX_4090)) == 1
    assert "neither SGLang nor vLLM is installed" in one_line(capsys)


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line.main(
            (
                "tune",
                "--no-such-flag",
            )
        )
    assert stopped.value.code == 2
