"""Reads params.json, the config of a checkpoint in Mistral's own layout, as the config.json that engines make of it.

From `adapt_config_dict` of SGLang 0.5.23 (utils/hf_transformers/mistral_utils.py) and of vLLM 0.33
(transformers_utils/configs/mistral.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from sglang_moe_ext.models.config_fields import read_field, refusal, show

FILE_NAME = "params.json"
_NAMES = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "hidden_dim": "intermediate_size"}
_MOE_NAMES = {
    "num_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "expert_hidden_dim": "moe_intermediate_size",
    "num_shared_experts": "n_shared_experts",
    "first_k_dense_replace": "first_k_dense_replace",
    "route_every_n": "moe_layer_freq",
}
_ACTIVATION_SCALES: dict[str, list[int] | None] = {"TENSOR": None, "NO_SCALES": None, "FP8_BLOCK": [128, 128]}
"""By `qscheme_act`, the block of the weights' scales."""


def to_hf_config(params: Mapping[str, object], source: str) -> dict[str, object]:
    """Raises: ModelError when the weights are quantized in a way that engines refuse."""
    config: dict[str, object] = {new: params[old] for old, new in _NAMES.items() if old in params}
    moe = read_field(params, "moe")
    if isinstance(moe, Mapping):
        config |= {new: moe[old] for old, new in _MOE_NAMES.items() if old in moe}
        has_shared = bool(moe.get("num_shared_experts"))
        config |= {
            "architectures": ["MistralLarge3ForCausalLM" if has_shared else "MixtralForCausalLM"],
            "model_type": "deepseek_v3" if has_shared else "mixtral",
        }
    quantization = read_field(params, "quantization")
    if isinstance(quantization, Mapping) and quantization:
        config["quantization_config"] = _quantization(quantization, source)
    return config


def _quantization(stated: Mapping[str, object], source: str) -> dict[str, object]:
    weights, activations = stated.get("qformat_weight"), stated.get("qscheme_act") or "TENSOR"
    if weights != "fp8_e4m3" or activations not in _ACTIVATION_SCALES:
        raise refusal(
            source,
            f"quantization of {show(weights)} weights with {show(activations)} activations, expected fp8_e4m3 with "
            f"one of {', '.join(_ACTIVATION_SCALES)}; state the experts with --shape",
        )
    return {"quant_method": "fp8", "weight_block_size": _ACTIVATION_SCALES[str(activations)]}
