"""What is known of an engine without asking it, its lookup run from its files and the rule of its backend, is so."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.core import CheckpointFormat, EngineError, Gpu, MoEShape, Quantization, Scheme
from sglang_moe_ext.engines import lookup_probe, partial_import
from sglang_moe_ext.engines.backend_answer import AskedBackend
from sglang_moe_ext.engines.installed_engines import parse_version
from sglang_moe_ext.engines.lookup_probe import LookupRequest, LookupResult
from sglang_moe_ext.engines.sglang import lookup_probe as sglang
from sglang_moe_ext.engines.sglang import support as sglang_support
from sglang_moe_ext.engines.vllm import lookup_probe as vllm
from sglang_moe_ext.engines.vllm import support as vllm_support
from sglang_moe_ext.engines.weight_only import is_weight_only
from sglang_moe_ext.gpu.names import find_gpu
from tests.engines.installed import (
    ENGINE_VERSIONS,
    HOOKED_VERSIONS,
    VLLM_VERSIONS,
    engine_environment,
    run_in_engine,
    run_in_vllm,
    vllm_environment,
)

CHILD = Path(__file__).parent / "children" / "lookup_answers.py"
TOKENS = (1, 3, 40, 5000)
H200, B200, RTX_4090 = find_gpu("H200"), find_gpu("B200"), find_gpu("RTX 4090")
MI300X, MI355X = find_gpu("MI300X"), find_gpu("MI355X")
QUESTIONS = {
    "a table of the engine": LookupRequest(MoEShape(128, 768, 2048, 8), TOKENS, H200),
    "a default, which the guard fits": LookupRequest(
        MoEShape(65, 1536, 2048, 5, Quantization("fp8_w8a8", (128, 128))), TOKENS, RTX_4090
    ),
    "a default that depends on shared memory": LookupRequest(
        MoEShape(60, 320, 2048, 4, Quantization("fp8_w8a8")), TOKENS, RTX_4090
    ),
    "groups of four bits": LookupRequest(
        MoEShape(97, 96, 256, 3, Quantization("int4_w4a16", (0, 32))), TOKENS, H200
    ),
    "a table for an AMD GPU": LookupRequest(MoEShape(8, 14336, 4096, 2), TOKENS, MI300X),
    "an entry that cannot be launched": LookupRequest(
        MoEShape(8, 8192, 6144, 2, Quantization("fp8_w8a8")), (256,), MI300X
    ),
    "a default on an AMD GPU": LookupRequest(
        MoEShape(97, 256, 2048, 8, Quantization("fp8_w8a8", (128, 128))), TOKENS, MI355X
    ),
}  # fmt: skip
BOTH = [("sglang", version) for version in HOOKED_VERSIONS] + [("vllm", version) for version in VLLM_VERSIONS]


@functools.cache
def own_store() -> dict[str, str]:
    return {"SGLANG_MOE_EXT_STORE": tempfile.mkdtemp(prefix="store-")}


@dataclass(frozen=True, slots=True)
class AskedFor:
    """A layer of `columns` a rank, on a GPU, in a server with that flag and a model of that architecture."""

    quantization: Quantization
    columns: int = 768
    gpu: Gpu = H200
    flag: str = "auto"
    architecture: str = "Qwen3MoeForCausalLM"

    @property
    def shape(self) -> MoEShape:
        return MoEShape(128, self.columns, 2048, 8, self.quantization)

    @property
    def request(self) -> Any:
        question = LookupRequest(self.shape, (1,), self.gpu, False, self.flag, self.architecture)
        return lookup_probe.request_of(question)["backend"]


def stored(method: str, bits: int = 4, **others: Any) -> Quantization:
    scheme: Scheme = "int4_w4a16" if bits == 4 else "int8_w8a16"
    return Quantization(scheme, (0, 128), checkpoint=CheckpointFormat(method, bits, 128, **others))


FP8 = Quantization("fp8_w8a8", (128, 128), checkpoint=CheckpointFormat("fp8"))
BY_CHANNEL = Quantization("fp8_w8a8", per_channel=True, checkpoint=CheckpointFormat("compressed_tensors"))
LAYERS = {
    "bf16": AskedFor(Quantization()),
    "bf16 on a B200": AskedFor(Quantization(), gpu=B200),
    "bf16 of Mixtral on a B200": AskedFor(Quantization(), gpu=B200, architecture="MixtralForCausalLM"),
    "bf16 on a B200 with the flag": AskedFor(Quantization(), gpu=B200, flag="triton"),
    "fp8 in blocks": AskedFor(FP8),
    "fp8 in blocks on a B200": AskedFor(FP8, gpu=B200),
    "fp8 in blocks, DeepGEMM": AskedFor(FP8, flag="deep_gemm"),
    "fp8 by channel": AskedFor(BY_CHANNEL),
    "AWQ": AskedFor(stored("awq", symmetric=False)),
    "AWQ that Marlin refuses": AskedFor(stored("awq", symmetric=False), columns=96),
    "AWQ under moe_wna16": AskedFor(stored("moe_wna16", symmetric=False)),
    "GPTQ": AskedFor(stored("gptq")),
    "GPTQ of 8 bits": AskedFor(stored("gptq", 8)),
    "GPTQ under moe_wna16": AskedFor(stored("moe_wna16")),
    "compressed-tensors of 4 bits": AskedFor(stored("compressed_tensors")),
    "compressed-tensors of 4 bits with the flag": AskedFor(stored("compressed_tensors"), flag="triton"),
    "compressed-tensors of 4 bits on a B200": AskedFor(stored("compressed_tensors"), gpu=B200),
    "compressed-tensors of 8 bits": AskedFor(stored("compressed_tensors", 8)),
}
OF_VLLM = [name for name, it in LAYERS.items() if is_weight_only(it.quantization) and it.flag == "auto"]
"""The others depend on compiled operators, which only the GPU itself has."""


@functools.cache
def said(engine: str, version: str) -> Mapping[str, Any]:
    request = {
        "engine": engine,
        "requests": [lookup_probe.request_of(it) for it in QUESTIONS.values()],
        "backends": [it.request for it in LAYERS.values()],
    }
    found: Mapping[str, Any]
    if engine == "sglang":
        found = run_in_engine(version, CHILD, request, env=own_store())
    else:
        found = run_in_vllm(CHILD, request, vllm_environment(version) | own_store())
    return found


def asked(engine: str, version: str) -> dict[str, LookupResult]:
    answers = said(engine, version)["answers"]
    return dict(zip(QUESTIONS, map(lookup_probe._answer, answers), strict=True))


def backends(engine: str, version: str) -> dict[str, AskedBackend | None]:
    found = said(engine, version)["backends"]
    return {name: it and AskedBackend(**it) for name, it in zip(LAYERS, found, strict=True)}


@functools.cache
def read(engine: str, version: str) -> dict[str, LookupResult]:
    of_engine = engine_environment(version) if engine == "sglang" else vllm_environment(version)
    module = sglang.FROM_FILES if engine == "sglang" else vllm.FROM_FILES
    with closing(module.start(of_engine | own_store())) as reader:
        return {name: reader.answer(question) for name, question in QUESTIONS.items()}


@pytest.mark.parametrize(("engine", "version"), BOTH)
def test_what_is_read_from_the_files_is_what_the_engine_answers(engine: str, version: str) -> None:
    answers, found = asked(engine, version), read(engine, version)
    assert all(answer.is_from_files for answer in found.values())
    assert {name: replace(answer, is_from_files=False) for name, answer in found.items()} == answers


@pytest.mark.parametrize(("engine", "version"), BOTH)
def test_an_engine_that_is_told_of_an_amd_gpu_takes_its_tables_and_its_defaults(engine: str, version: str) -> None:
    answers = asked(engine, version)
    shipped, default = answers["a table for an AMD GPU"], answers["a default on an AMD GPU"]
    assert [file.name for file in shipped.files] == ["E=8,N=14336,device_name=AMD_Instinct_MI300X.json"]
    assert {config.matrix_instr_nonkdim for config in shipped.up.values()} == {16}, "the table's own options"
    assert {config.num_stages for config in default.up.values()} == {2}, "on NVIDIA GPUs the same default has three"
    assert not default.files


@pytest.mark.parametrize("version", HOOKED_VERSIONS)
def test_a_shipped_entry_for_an_mi300x_that_cannot_be_launched_is_fitted_to_its_lds(version: str) -> None:
    """Four stages of 128x256x128: 147,456 B by Triton 3.7.1 for gfx942, which has 65,536."""
    answer = asked("sglang", version)["an entry that cannot be launched"]
    assert answer.written[256]["up"]["num_stages"] == 4
    assert "64 KiB of shared memory: num_stages 4 -> 2" in answer.fitted[256]["up"]


@pytest.mark.parametrize("version", VLLM_VERSIONS)
def test_vllms_table_for_the_same_layer_needs_no_fitting(version: str) -> None:
    assert not asked("vllm", version)["an entry that cannot be launched"].fitted


@pytest.mark.parametrize("version", ENGINE_VERSIONS)
def test_sglang_runs_the_backend_that_the_rule_says(version: str) -> None:
    release = parse_version(version)
    for name, backend in backends("sglang", version).items():
        layer = LAYERS[name]
        if backend is None:
            assert release < (0, 5, 11) and name.startswith("compressed"), name  # Marlin, without a runner
            continue
        rule = sglang_support.why_no_table(layer.flag, layer.shape, layer.gpu, layer.architecture, release)
        if "is not known" not in (rule or ""):
            assert (rule is None) == backend.reads_tables, (name, backend, rule)


@pytest.mark.parametrize("version", VLLM_VERSIONS)
def test_vllm_runs_the_backend_that_the_rule_says(version: str) -> None:
    answers = backends("vllm", version)
    assert {name for name, it in answers.items() if it is not None} >= set(OF_VLLM)
    for name in OF_VLLM:
        layer, backend = LAYERS[name], answers[name]
        rule = vllm_support.why_no_table(layer.shape, layer.gpu, layer.architecture, parse_version(version))
        assert backend is not None
        assert (rule is None) == backend.reads_tables, (name, backend, rule)


def test_on_a_b200_the_architecture_decides_what_sglang_takes() -> None:
    answers = backends("sglang", "0.5.15")
    taken = {name: it and it.name for name, it in answers.items() if name.startswith("bf16")}
    assert taken == {
        "bf16": "triton",
        "bf16 on a B200": "flashinfer_trtllm",
        "bf16 of Mixtral on a B200": "triton",
        "bf16 on a B200 with the flag": "triton",
    }


def test_what_was_asked_comes_before_the_rule_and_is_said_to_be_asked() -> None:
    shape, reads = MoEShape(8, 768, 2048, 2), AskedBackend("triton", "UnquantizedFusedMoEMethod")
    other = AskedBackend("flashinfer_trtllm", "UnquantizedFusedMoEMethod")
    assert "is not known" in str(sglang_support.why_no_table("auto", shape, B200, ""))
    assert sglang_support.why_no_table("auto", shape, B200, "", (0, 5, 15), reads) is None
    assert "(asked SGLang 0.5.15: Unq" in str(sglang_support.why_no_table("auto", shape, B200, "", (0, 5, 15), other))
    assert "(asked vLLM 0.33.0: Unq" in str(vllm_support.why_no_table(shape, H200, "", (0, 33, 0), other))
    fp8 = MoEShape(8, 768, 2048, 2, FP8)
    assert "no fp8" in str(sglang_support.why_no_table("auto", fp8, find_gpu("A100"), "", (0, 5, 15), reads))


def test_a_checkpoint_that_may_say_more_is_not_asked_about() -> None:
    assert AskedFor(stored("auto_round")).request is None
    assert AskedFor(Quantization("int4_w4a16", (0, 128))).request is None


def test_the_answers_are_not_all_the_same_default() -> None:
    answers = read("sglang", "0.5.23")
    assert answers["a table of the engine"].files
    assert answers["a default, which the guard fits"].files == ()
    assert all(answer.plugin == "active" for answer in answers.values())


def test_a_function_that_needs_more_than_is_known_is_not_run(tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_text("from engine.news import rank\n\ndef chosen():\n    return rank() + 1\n")
    with pytest.raises(EngineError, match="has no rank, or takes it from elsewhere"):
        partial_import.load("chosen_module", file, ("chosen",), {})
    assert partial_import.load("chosen_module", file, ("chosen",), {"rank": lambda: 2}).chosen() == 3


def test_a_file_that_is_no_python_is_said_to_be() -> None:
    with pytest.raises(EngineError, match="cannot read"):
        partial_import.load("nothing", Path(__file__).with_name("absent.py"), ("chosen",), {})
