"""What the tuner builds on in three releases of the real vLLM: signatures, binaries, and that the layer is right."""

from __future__ import annotations

import ast
import functools
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext.core import CompileJob, MoEShape, Quantization, Target, TileConfig
from sglang_moe_ext.engines.vllm.runner import _class, representative_tokens
from sglang_moe_ext.gpu.shared_memory import smem_bytes
from sglang_moe_ext.kernel_plans import (
    DownConfig,
    KernelPlan,
    UpConfig,
    WarpSpecializedDown,
    WarpSpecializedUp,
)
from sglang_moe_ext.tables import plan_table
from sglang_moe_ext.tuning.search.final_comparison import TOLERATED_ERROR
from tests.engines.installed import ENGINES_DIR, VLLM_VERSIONS, run_in_vllm, vllm_environment

pytestmark = pytest.mark.usefixtures("forked_engines")

CHILDREN = Path(__file__).parents[1] / "children"
FP8_BLOCK = Quantization("fp8_w8a8", (32, 32))
SMALL = TileConfig(16, 32, 32, 4, 4, 2)


def _answers(version: str, child: str, asked: object, **variables: str) -> Any:
    return run_in_vllm(CHILDREN / child, asked, vllm_environment(version) | variables)


@functools.cache
def functions(version: str) -> dict[str, list[str]]:
    """By the functions of the engine's module, the names of their arguments."""
    source = ENGINES_DIR / "vllm" / version / "vllm/model_executor/layers/fused_moe/fused_moe.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    return {
        node.name: [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }


CALLED = {
    "_prepare_expert_assignment": "topk_ids config num_tokens top_k_num global_num_experts expert_map use_int8_w8a16 "
    "use_int4_w4a16 block_shape ignore_invalid_experts",
    "dispatch_fused_moe_kernel": "A B C A_scale B_scale B_zp topk_weights sorted_token_ids expert_ids "
    "num_tokens_post_padded mul_routed_weight top_k config compute_type use_fp8_w8a8 use_int8_w8a8 use_int8_w8a16 "
    "use_int4_w4a16 per_channel_quant block_shape",
    "fused_experts_impl": "hidden_states w1 w2 topk_weights topk_ids activation use_fp8_w8a8 use_int8_w8a8 "
    "use_int8_w8a16 use_int4_w4a16 per_channel_quant global_num_experts expert_map w1_scale w2_scale block_shape",
    "should_moe_wna16_use_cuda": "",
    "try_get_optimal_moe_config": "",
}
TILE = {"BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "SPLIT_K"}


@pytest.mark.parametrize("version", VLLM_VERSIONS)
@pytest.mark.parametrize("name", CALLED)
def test_what_we_call_takes_what_we_give_it(version: str, name: str) -> None:
    assert set(CALLED[name].split()) <= set(functions(version)[name])


@pytest.mark.parametrize("version", VLLM_VERSIONS)
@pytest.mark.parametrize("kernel", ["fused_moe_kernel", "fused_moe_kernel_gptq_awq"])
def test_a_kernel_takes_every_field_of_an_entry_and_no_use_tma(version: str, kernel: str) -> None:
    arguments = set(functions(version)[kernel])
    assert arguments >= TILE
    assert "USE_TMA" not in arguments


LAYERS: dict[str, tuple[MoEShape, int, TileConfig]] = {
    "few tokens, which are not sorted": (MoEShape(8, 48, 64, 2), 1, TileConfig(16, 32, 32, 1, 4, 2)),
    "bf16": (MoEShape(8, 48, 64, 2), 33, SMALL),
    "bf16, a rank of two": (MoEShape(4, 48, 64, 2, ep=2), 33, SMALL),
    "bf16, a rank of two, few tokens": (MoEShape(8, 48, 64, 2, ep=2), 1, SMALL),
    "bf16, not gated": (MoEShape(4, 48, 64, 2, gated=False), 7, SMALL),
    "fp16": (MoEShape(4, 48, 64, 2, dtype="float16"), 7, SMALL),
    "fp8 block": (MoEShape(4, 64, 64, 2, FP8_BLOCK), 33, SMALL),
    "fp8 block, K beyond the block": (MoEShape(4, 64, 64, 2, FP8_BLOCK), 33, TileConfig(16, 32, 64, 4, 4, 2)),
    "fp8 channel": (MoEShape(4, 64, 64, 2, Quantization("fp8_w8a8", per_channel=True)), 33, SMALL),
    "fp8 tensor": (MoEShape(4, 64, 64, 2, Quantization("fp8_w8a8")), 33, SMALL),
    "int8 channel": (MoEShape(4, 64, 64, 2, Quantization("int8_w8a8", per_channel=True)), 33, SMALL),
    "int8 weights": (MoEShape(4, 64, 64, 2, Quantization("int8_w8a16", per_channel=True)), 33, SMALL),
    "int8 groups": (MoEShape(4, 64, 64, 2, Quantization("int8_w8a16", (0, 32))), 33, SMALL),
    "int4 groups": (MoEShape(4, 64, 64, 2, Quantization("int4_w4a16", (0, 32))), 33, SMALL),
}


@functools.cache
def interpreted(version: str) -> dict[str, dict[str, Any]]:
    """Of each layer in that version, all from one process; its compiled operators are stood in for (see the child)."""
    asked = [{"shape": asdict(shape), "tokens": m, "config": astuple(config)} for shape, m, config in LAYERS.values()]
    return dict(zip(LAYERS, _answers(version, "vllm_layer.py", asked, TRITON_INTERPRET="1"), strict=True))


@pytest.mark.parametrize("version", VLLM_VERSIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_is_right_in_tritons_interpreter(version: str, name: str) -> None:
    assert interpreted(version)[name]["layer"] <= TOLERATED_ERROR[LAYERS[name][0].quantization.scheme]


@pytest.mark.parametrize("version", VLLM_VERSIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_gemm_alone_is_right_in_tritons_interpreter(version: str, name: str) -> None:
    assert interpreted(version)[name]["up"] <= 3e-3


@pytest.mark.parametrize("version", VLLM_VERSIONS)
def test_only_few_tokens_of_one_rank_are_not_sorted(version: str) -> None:
    unsorted = [name for name, found in interpreted(version).items() if not found["sorted"]]
    assert unsorted == ["few tokens, which are not sorted"]


GLM = MoEShape(64, 1536, 2048, 4)
QWEN_FP8 = MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", (128, 128)))
QWEN_INT4 = MoEShape(128, 768, 2048, 8, Quantization("int4_w4a16", (0, 128)))
COMPILED = {
    f"{name}, M={tokens}": (shape, sm, config, tokens)
    for name, shape, sm, config in (
        ("bf16 on Hopper", GLM, 90, TileConfig(64, 128, 64, 16, 4, 3)),
        ("fp8 block on Hopper", QWEN_FP8, 90, TileConfig(16, 128, 128, 16, 4, 3)),
        ("int4 on Ampere", QWEN_INT4, 80, TileConfig(32, 64, 64, 16, 4, 3)),
        ("bf16 on a rank of 8", MoEShape(16, 768, 2048, 8, ep=8), 89, TileConfig(32, 64, 64, 1, 4, 3)),
    )
    for tokens in (1, 24, 1024)
}


@functools.cache
def binaries(version: str) -> dict[str, Any]:
    asked = [
        {
            "job": asdict(CompileJob(shape, "up", tokens, config.compile_key, Target(sm))),
            "config": astuple(config),
            "tokens": tokens,
        }
        for shape, sm, config, tokens in COMPILED.values()
    ]
    return dict(zip(COMPILED, _answers(version, "vllm_binaries.py", asked), strict=True))


@pytest.mark.parametrize("version", VLLM_VERSIONS)
@pytest.mark.parametrize("case", COMPILED)
def test_the_layer_launches_the_binaries_that_the_farm_made(version: str, case: str) -> None:
    found = binaries(version)[case]
    assert len(found["launched"]) == 2
    assert found["launched"] == found["made"]


@pytest.mark.parametrize("version", VLLM_VERSIONS)
@pytest.mark.parametrize("case", COMPILED)
def test_the_binary_for_any_group_needs_the_memory_of_the_engines_own(version: str, case: str) -> None:
    found = binaries(version)[case]
    assert [needs[0] for needs in found["any_group"]] == [needs[0] for needs in found["own"]]


@pytest.mark.parametrize("version", VLLM_VERSIONS)
@pytest.mark.parametrize("case", [case for case in COMPILED if case.startswith("bf16")])
def test_a_binary_needs_as_much_memory_as_the_rules_say(version: str, case: str) -> None:
    shape, sm, config, _ = COMPILED[case]
    expected = smem_bytes(config, shape, Target(sm))
    assert all(expected <= smem <= expected + 1024 for smem, _, _ in binaries(version)[case]["own"])


@given(st.integers(1, 400), st.integers(1, 300), st.integers(1, 8), st.sampled_from([1, 2, 4]))
def test_a_representative_is_of_the_same_class_and_no_larger(tokens: int, experts: int, top_k: int, ep: int) -> None:
    shape = MoEShape(max(experts, top_k), 64, 64, top_k, ep=ep)
    found = representative_tokens(shape, tokens)
    assert found <= tokens
    assert _class(shape, found) == _class(shape, tokens)


def test_a_plan_behind_our_sort_launches_the_binaries_that_the_pool_made() -> None:
    """In the newest release: nothing of it is the engine's."""
    plans = [
        KernelPlan(UpConfig(64, 128, 64, 8, 4, 4), DownConfig(64, 128, 64, 8, 4, 4, True, 2)),
        KernelPlan(WarpSpecializedUp(2), WarpSpecializedDown("wide", 4)),
    ]
    asked = [{"shape": str(GLM), "plan": plan_table.document_of(plan), "tokens": 4096} for plan in plans]
    for found in _answers(VLLM_VERSIONS[-1], "sorted_binaries.py", asked, ENGINE="vllm"):
        assert len(found["launched"]) >= 4
        assert set(found["launched"]) == set(found["made"])
