"""An engine's lookup that is run from its files alone answers as the whole engine does."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.core import EngineError, MoEShape, Quantization
from sglang_moe_ext.engines import lookup_probe, partial_import
from sglang_moe_ext.engines.lookup_probe import LookupRequest, LookupResult
from sglang_moe_ext.engines.sglang import lookup_probe as sglang
from sglang_moe_ext.engines.vllm import lookup_probe as vllm
from sglang_moe_ext.gpu.names import find_gpu
from tests.engines.installed import (
    HOOKED_VERSIONS,
    VLLM_VERSIONS,
    engine_environment,
    run_in_engine,
    run_in_vllm,
    vllm_environment,
)

CHILD = Path(__file__).parent / "children" / "lookup_answers.py"
TOKENS = (1, 3, 40, 5000)
H200, RTX_4090 = find_gpu("H200"), find_gpu("RTX 4090")
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
}  # fmt: skip
BOTH = [("sglang", version) for version in HOOKED_VERSIONS] + [("vllm", version) for version in VLLM_VERSIONS]


@functools.cache
def own_store() -> dict[str, str]:
    return {"SGLANG_MOE_EXT_STORE": tempfile.mkdtemp(prefix="store-")}


@functools.cache
def asked(engine: str, version: str) -> dict[str, LookupResult]:
    request = {"engine": engine, "requests": [lookup_probe.request_of(it) for it in QUESTIONS.values()]}
    said: list[Mapping[str, Any]]
    if engine == "sglang":
        said = run_in_engine(version, CHILD, request, env=own_store())
    else:
        said = run_in_vllm(CHILD, request, vllm_environment(version) | own_store())
    return dict(zip(QUESTIONS, map(lookup_probe._answer, said), strict=True))


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
