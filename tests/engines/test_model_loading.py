"""The hook before a model is loaded, in real releases of both engines: reached, and told what the server was told."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext import env
from tests.engines.installed import VLLM_VERSIONS, run_in_engine, run_in_vllm, vllm_environment

CHILDREN = Path(__file__).parent / "children"
GRAPHS = [1, 2, 4, 8, 12, 16, 24, 32]
TOKENS = [1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
SGLANG_VERSIONS = ("0.5.12", "0.5.23")
"""Before settings had namespaces, and with them."""
ARGUMENTS = {
    "model_path": "m",
    "quantization": None,
    "trust_remote_code": False,
    "disable_shared_experts_fusion": True,
    "tp_size": 4,
    "ep_size": 2,
    "pp_size": 1,
    "dp_size": 1,
    "nnodes": 1,
    "moe_dp_size": 1,
    "gpu_id_step": 1,
    "base_gpu_id": 2,
    "chunked_prefill_size": 8192,
    "max_prefill_tokens": 16384,
    "enable_dp_attention": False,
    "moe_runner_backend": "triton",
    "moe_a2a_backend": "none",
    "ep_num_redundant_experts": 0,
    "enable_deterministic_inference": False,
    "speculative_num_draft_tokens": None,
}


@functools.cache
def of_sglang(version: str) -> dict[str, Any]:
    asked = {"arguments": ARGUMENTS, "graphs": GRAPHS}
    found: dict[str, Any] = run_in_engine(
        version, CHILDREN / "loading_sglang.py", asked, env={env.AUTOTUNE: "60", "SGLANG_USE_CPU_ENGINE": "1"}
    )
    return found


@functools.cache
def of_vllm(version: str) -> dict[str, Any]:
    parallel = {"tensor_parallel_size": 2, "data_parallel_size": 2, "enable_expert_parallel": True, "enable_eplb": True}
    model = {"quantization": "fp8"}
    asked = {"parallel": parallel, "model": model, "graphs": [6, 16], "chunk": 4096, "redundant": 4}
    environment = vllm_environment(version) | {env.AUTOTUNE: "60"}
    found: dict[str, Any] = run_in_vllm(CHILDREN / "loading_vllm.py", asked, environment)
    return found


@pytest.mark.parametrize("version", SGLANG_VERSIONS)
def test_sglang_tunes_the_layer_of_its_settings(version: str) -> None:
    flags = "--engine sglang --model m --tp-size 4 --ep-size 2 --served-by-triton --disable-shared-experts-fusion"
    assert " ".join(of_sglang(version)["flags"]) == flags


@pytest.mark.parametrize("version", SGLANG_VERSIONS)
def test_sglang_tunes_its_graphs_and_its_prefill_chunk(version: str) -> None:
    assert of_sglang(version)["tokens"] == TOKENS


@pytest.mark.parametrize("version", SGLANG_VERSIONS)
def test_sglang_tunes_on_the_gpus_of_all_ranks(version: str) -> None:
    assert of_sglang(version)["gpus"] == [2, 3, 4, 5]


@pytest.mark.parametrize("version", SGLANG_VERSIONS)
def test_every_setting_that_is_read_stands_where_sglang_has_it(version: str) -> None:
    assert of_sglang(version)["wrong"] == {}


@pytest.mark.parametrize("version", SGLANG_VERSIONS)
def test_sglangs_own_function_runs_afterwards(version: str) -> None:
    assert "CUDA" in of_sglang(version)["went_on"]


@pytest.mark.parametrize("version", VLLM_VERSIONS)
def test_vllm_tunes_the_layer_of_its_config(version: str) -> None:
    flags = "--engine vllm --model m --tp-size 4 --enable-expert-parallel --quantization fp8"
    assert " ".join(of_vllm(version)["flags"]) == f"{flags} --ep-num-redundant-experts 4"


@pytest.mark.parametrize("version", VLLM_VERSIONS)
def test_vllm_tunes_its_graphs_and_its_largest_batch_of_all_ranks(version: str) -> None:
    assert of_vllm(version)["tokens"] == [1, 2, 4, 8, 12, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]


@pytest.mark.parametrize("version", VLLM_VERSIONS)
def test_vllm_tunes_on_the_gpus_of_its_tensor_parallel_group(version: str) -> None:
    assert of_vllm(version)["gpus"] == [2, 3]


@pytest.mark.parametrize("version", VLLM_VERSIONS)
def test_vllms_own_function_runs_afterwards(version: str) -> None:
    assert "_maybe_get_memory_pool_context" in of_vllm(version)["went_on"]
