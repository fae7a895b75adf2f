"""What stands around the experts is read off config.json, and only where its attention is understood."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_moe_ext.core import DecoderShape, MoEModel
from sglang_moe_ext.models.builtin import builtin_models
from sglang_moe_ext.models.decoder import read_decoder

QWEN: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "sliding_window": None,
    "use_sliding_window": False,
}
DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
MODEL = MoEModel("m", "", 128, 8, 2048, 768, moe_layers=48)
SHARED = MoEModel("m", "", 256, 8, 7168, 2048, shared_experts=1, moe_layers=58)


def test_grouped_attention_is_read() -> None:
    assert read_decoder(QWEN, MODEL) == DecoderShape(48, 2048, heads=32, kv_heads=4, query_dim=128, value_dim=128)


def test_latent_attention_dense_layers_and_shared_experts_are_read() -> None:
    assert read_decoder(DEEPSEEK, SHARED) == DecoderShape(
        61,
        7168,
        heads=128,
        kv_heads=128,
        query_dim=192,
        value_dim=128,
        latent_dim=512,
        query_rank=1536,
        rope_dim=64,
        dense_width=18432,
        shared_width=2048,
    )


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "DeepSeek-V3"])
def test_a_built_in_model_has_what_its_config_says(name: str) -> None:
    config, model = (QWEN, MODEL) if name.startswith("Qwen") else (DEEPSEEK, SHARED)
    assert builtin_models()[name].decoder == read_decoder(config, model)


def test_layers_with_a_window_are_counted() -> None:
    kinds = ["sliding_attention", "full_attention"] * 24
    found = read_decoder({**QWEN, "layer_types": kinds, "sliding_window": 128}, MODEL)
    assert found is not None
    assert (found.windowed_layers, found.window) == (24, 128)


@pytest.mark.parametrize(
    "more",
    [
        {"linear_num_value_heads": 32},
        {"layer_types": ["linear_attention", "full_attention"] * 24},
        {"hybrid_layer_pattern": [0, 1]},
        {"index_topk": 2048},
        {"mamba_num_heads": 64},
        {"attn_type_list": [0, 1]},
        {"num_attention_heads": None},
        {"num_attention_heads": "many"},
        {"layer_types": ["sliding_attention"] * 48},
    ],
    ids=str,
)
def test_attention_that_is_not_understood_is_not_estimated(more: dict[str, Any]) -> None:
    assert read_decoder({**QWEN, **more}, MODEL) is None


def test_minimax_layers_that_are_all_softmax_are_read() -> None:
    assert read_decoder({**QWEN, "attn_type_list": [1] * 48}, MODEL) is not None
