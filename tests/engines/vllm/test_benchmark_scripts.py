"""The patch of `get_model_params` of vLLM's benchmark_moe.py, against a stand-in that keeps its contract.

The script lies in vLLM's source tree alone. Its contract: a config object in, (E, top-k, width, hidden size) out; names
among the constants, a Mixtral otherwise.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_moe_ext.engines.vllm import benchmark_scripts

SIZES = {"hidden_size": 512, "intermediate_size": 4096, "moe_intermediate_size": 256, "n_routed_experts": 64}
SIZES |= {"num_experts_per_tok": 4, "n_shared_experts": 1}
OURS = (64, 4, 256, 512)


def get_model_params(config: Any) -> tuple[int, int, int, int]:
    if config.architectures[0] in ("NamedForCausalLM", "AnotherForCausalLM"):
        return -1, -1, -1, -1
    return config.num_local_experts, config.num_experts_per_tok, config.intermediate_size, config.hidden_size


def config(architecture: str, **fields: object) -> SimpleNamespace:
    return SimpleNamespace(architectures=[architecture], **{**SIZES, **fields})


def test_what_upstream_names_stays_its_answer() -> None:
    assert benchmark_scripts.patch(get_model_params)(config("NamedForCausalLM")) == (-1, -1, -1, -1)


def test_a_mixtral_stays_upstreams_answer() -> None:
    asked = config("MixtralForCausalLM", num_local_experts=7)
    assert benchmark_scripts.patch(get_model_params)(asked) == (7, 4, 4096, 512)


def test_where_upstream_raises_we_answer(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert benchmark_scripts.patch(get_model_params)(config("UnnamedForCausalLM")) == OURS
    (line,) = caplog.messages
    assert "experts 64, top-k 4, expert width 256, hidden size 512; get_model_params raised AttributeError" in line


def test_a_silently_wrong_width_is_corrected_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        asked = config("UnnamedForCausalLM", num_local_experts=64)
        assert benchmark_scripts.patch(get_model_params)(asked) == OURS
    assert "took it for a Mixtral" in caplog.text


def test_upstreams_error_is_the_users_where_we_have_no_answer() -> None:
    with pytest.raises(AttributeError, match="num_local_experts"):
        benchmark_scripts.patch(get_model_params)(SimpleNamespace(architectures=["UnnamedForCausalLM"]))


def test_a_function_that_names_no_architecture_is_left_alone() -> None:
    def upstream(config: Any) -> tuple[int, int, int, int]:
        return config["MODEL"]  # type: ignore[no-any-return]

    assert benchmark_scripts.patch(upstream) is upstream
