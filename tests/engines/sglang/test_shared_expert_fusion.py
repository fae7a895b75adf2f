"""The fusion rules against each real SGLang's own gate: one subprocess a version, all models at once."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.core import EngineError, MoEModel
from sglang_moe_ext.engines.installed_engines import parse_version
from sglang_moe_ext.engines.sglang.sharding import RULES, fused_shared_experts
from tests.engines.installed import ENGINE_VERSIONS, run_in_engine

CHILD = Path(__file__).parents[1] / "children" / "fusion_gate.py"

UNKNOWN_MODEL_TYPES = ["deepseek_v32"]
"""Known to the transformers of the test environment, unknown to the 4.57.1 and 5.3.0 that SGLang pins until 0.5.11."""

ABSENT_PACKAGES = {
    # deepseek_v4 imports tilelang; from here on dsa kernels import CuTe DSL unconditionally, which needs a CUDA wheel
    **{it: ["cutlass", "cuda", "tilelang"] for it in ("0.5.13", "0.5.14")},
    **{it: ["cutlass", "cuda"] for it in ("0.5.15", "0.5.16", "0.5.17")},
    # bailing_moe_v3 imports a kernel of it wherever is_cuda() is false
    **{it: ["vllm"] for it in ("0.5.19", "0.5.20", "0.5.21", "0.5.22")},
}

SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 160000,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}


@dataclass(frozen=True, slots=True)
class Case:
    """A model as its config.json tells it; `asked_from` is the first studied version that serves it."""

    name: str
    architecture: str
    module: str
    routed: int
    shared: int
    config: dict[str, Any]
    asked_from: str = "0.5.8"

    @property
    def model(self) -> MoEModel:
        return MoEModel(
            name=self.name,
            architecture=self.architecture,
            routed_experts=self.routed,
            top_k=8,
            hidden_size=256,
            intermediate_size=512,
            shared_experts=self.shared,
        )


def flat(
    name: str,
    architecture: str,
    module: str,
    model_type: str,
    experts: tuple[int, int],
    *,
    keys: tuple[str, str] = ("n_routed_experts", "n_shared_experts"),
    since: str = "0.5.8",
    **rest: Any,
) -> Case:
    """A config with the experts on top; `experts` is (routed, shared), `keys` what config.json calls the two."""
    names = {"architectures": [architecture], "model_type": model_type, **dict(zip(keys, experts, strict=True))}
    return Case(name, architecture, module, *experts, {**SIZES, **names, **rest}, since)


def nested(inner: Case, architecture: str, module: str, model_type: str, since: str, part: str = "text_config") -> Case:
    """A config that wraps the one of its language model."""
    config = {"architectures": [architecture], "model_type": model_type, part: inner.config}
    return Case(inner.name, architecture, module, inner.routed, inner.shared, config, since)


def qwen(name: str, architecture: str, module: str, model_type: str, routed: int, shared: int, since: str) -> Case:
    """Qwen states the width of its shared experts, not their number."""
    sizes = {"num_experts": routed, "shared_expert_intermediate_size": 512 * shared, "norm_topk_prob": True}
    names = {"architectures": [architecture], "model_type": model_type}
    return Case(name, architecture, module, routed, shared, {**SIZES, **names, **sizes}, since)


def without_architecture(case: Case) -> Case:
    """Language models of some wrappers leave the architecture to the wrapper."""
    config = {key: value for key, value in case.config.items() if key != "architectures"}
    return Case(case.name, case.architecture, case.module, case.routed, case.shared, config, case.asked_from)


V3, DSA, GLM, LITE = "DeepseekV3ForCausalLM", "GlmMoeDsaForCausalLM", "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM"
DSA_KEYS: dict[str, Any] = {"index_topk": 2048, "index_head_dim": 128, "index_n_heads": 64}
M3_KEYS = ("num_local_experts", "n_shared_experts")
BAILING_KEYS = ("num_experts", "num_shared_experts")
GLM_45V = without_architecture(flat("GLM-4.5V", GLM, "", "glm4v_moe_text", (128, 1)))
M3 = flat(
    "M3", "MiniMaxM3SparseForCausalLM", "minimax_m3", "minimax_m3_vl_text", (128, 1), keys=M3_KEYS, since="0.5.18"
)
LING_3 = flat(
    "Ling-3",
    "BailingMoeV3ForCausalLM",
    "bailing_moe_v3",
    "bailing_hybrid",
    (256, 1),
    keys=BAILING_KEYS,
    since="0.5.20",
    moe_shared_expert_intermediate_size=512,
)
GLM_5_NEXT = without_architecture(flat("GLM-5-Next", "", "", "glm5_next_text", (288, 1)))
QWEN_35 = without_architecture(qwen("Qwen3.5", "", "", "qwen3_5_moe_text", 256, 1, ""))

CASES: tuple[Case, ...] = (
    flat("DeepSeek-V3", V3, "deepseek_v2", "deepseek_v3", (256, 1)),
    flat("DeepSeek-V3-two-shared", V3, "deepseek_v2", "deepseek_v3", (256, 2)),
    flat("Kimi-K2", V3, "deepseek_v2", "deepseek_v3", (384, 1)),
    flat("Moonlight", V3, "deepseek_v2", "deepseek_v3", (64, 2)),
    flat("DeepSeek-V3.2", "DeepseekV32ForCausalLM", "deepseek_v2", "deepseek_v32", (256, 1), **DSA_KEYS),
    flat("DeepSeek-V3.2-small", "DeepseekV32ForCausalLM", "deepseek_v2", "deepseek_v32", (128, 1), **DSA_KEYS),
    flat("DeepSeek-V2-Lite", "DeepseekV2ForCausalLM", "deepseek_v2", "deepseek_v2", (64, 2)),
    flat("DeepSeek-V4", "DeepseekV4ForCausalLM", "deepseek_v4", "deepseek_v4", (256, 1), since="0.5.12"),
    flat("Mistral-Large-3", "MistralLarge3ForCausalLM", "mistral_large_3", "deepseek_v3", (128, 1)),
    flat("GLM-5", DSA, "glm4_moe", "glm_moe_dsa", (256, 1), since="0.5.10"),
    flat("GLM-5-small", DSA, "glm4_moe", "glm_moe_dsa", (128, 1), since="0.5.10"),
    flat("GLM-4.5", GLM, "glm4_moe", "glm4_moe", (160, 1)),
    flat("GLM-4.5-Air", GLM, "glm4_moe", "glm4_moe", (128, 1)),
    flat("GLM-4.7-Flash", LITE, "glm4_moe_lite", "glm4_moe_lite", (64, 1)),
    flat("GLM-4.7-Flash-two-shared", LITE, "glm4_moe_lite", "glm4_moe_lite", (64, 2)),
    nested(GLM_45V, "Glm4vMoeForConditionalGeneration", "glm4v_moe", "glm4v_moe", "0.5.8"),
    nested(GLM_5_NEXT, "Glm5NextForConditionalGeneration", "glm5_next", "glm5_next", "0.5.20"),
    qwen("Qwen3-Next", "Qwen3NextForCausalLM", "qwen3_next", "qwen3_next", 512, 1, "0.5.8"),
    qwen("Qwen3-Next-wide-shared", "Qwen3NextForCausalLM", "qwen3_next", "qwen3_next", 512, 2, "0.5.8"),
    # 0.5.10 serves it too, but leaves its text_config a dict under the transformers of the test environment
    nested(QWEN_35, "Qwen3_5MoeForConditionalGeneration", "qwen3_5", "qwen3_5_moe", "0.5.12"),
    qwen("Qwen2-MoE", "Qwen2MoeForCausalLM", "qwen2_moe", "qwen2_moe", 64, 8, "0.5.8"),
    qwen("Qwen3-MoE", "Qwen3MoeForCausalLM", "qwen3_moe", "qwen3_moe", 128, 0, "0.5.8"),
    flat("Mixtral", "MixtralForCausalLM", "mixtral", "mixtral", (8, 0), keys=M3_KEYS),
    M3,
    nested(M3, "MiniMaxM3SparseForConditionalGeneration", "minimax_m3_vl", "minimax_m3_vl", "0.5.18"),
    LING_3,
    flat(
        "Ling-3-two-shared",
        "BailingMoeV3ForCausalLM",
        "bailing_moe_v3",
        "bailing_hybrid",
        (256, 2),
        keys=BAILING_KEYS,
        since="0.5.20",
        moe_shared_expert_intermediate_size=1024,
    ),
    nested(
        without_architecture(LING_3),
        "BailingMoeV3VLForConditionalGeneration",
        "bailing_mm_v3",
        "bailing_moe_v3_vl",
        "0.5.23",
    ),
    flat("dots3", "Dots3NoteForCausalLM", "dots3", "dots3_note", (256, 1), since="0.5.20"),
    flat("dots3-small", "Dots3NoteForCausalLM", "dots3", "dots3_note", (128, 1), since="0.5.20"),
    flat("dots.vlm1", "DotsVLMForCausalLM", "dots_vlm", "dots_vlm", (256, 1), vision_config={}),
    flat("HY-V4", "HYV4ForCausalLM", "hunyuan_v4", "hy_v4", (256, 1), since="0.5.20"),
    nested(
        flat("Kimi-VL", V3, "", "deepseek_v3", (64, 2)),
        "KimiVLForConditionalGeneration",
        "kimi_vl",
        "kimi_vl",
        "0.5.8",
    ),
    nested(
        flat("Kimi-K2.5", V3, "", "kimi_k2", (384, 1)),
        "KimiK25ForConditionalGeneration",
        "kimi_k25",
        "kimi_k25",
        "0.5.10",
    ),
    nested(
        flat("DeepSeek-VL2", "DeepseekV2ForCausalLM", "", "deepseek_v2", (72, 2), use_mla=True),
        "DeepseekVL2ForCausalLM",
        "deepseek_vl2",
        "deepseek_vl_v2",
        "0.5.8",
        part="language_config",
    ),
)
EXPERT_PARALLEL = (1, 2)


def asked(version: str) -> dict[str, tuple[Case, int]]:
    """Name of the question -> case and expert parallelism, of the models this version serves."""
    return {
        f"{case.name} as {case.architecture}, ep {ep}": (case, ep)
        for case in CASES
        for ep in EXPERT_PARALLEL
        if parse_version(case.asked_from) <= parse_version(version)
    }


@functools.cache
def engine_says(version: str) -> dict[str, Any]:
    request = {
        "cases": {
            name: {"module": case.module, "ep": ep, "config": case.config}
            for name, (case, ep) in asked(version).items()
        },
        "unknown_model_types": UNKNOWN_MODEL_TYPES if parse_version(version) < (0, 5, 12) else [],
        "absent_packages": ABSENT_PACKAGES.get(version.partition(".post")[0], []),
    }
    answer: dict[str, Any] = run_in_engine(version, CHILD, request)
    return answer


@pytest.mark.parametrize("version", ENGINE_VERSIONS)
def test_every_model_module_of_the_engine_could_be_asked(version: str) -> None:
    assert engine_says(version)["unimportable"] == {}


@pytest.mark.parametrize("version", ENGINE_VERSIONS)
def test_our_count_of_fused_shared_experts_is_the_engines_own(version: str) -> None:
    ours = {
        name: fused_shared_experts(case.model, ep, parse_version(version))
        for name, (case, ep) in asked(version).items()
    }
    assert ours == engine_says(version)["fused"]


@pytest.mark.parametrize("case", [case for case in CASES if case.asked_from != "0.5.8"], ids=lambda case: case.name)
def test_a_model_that_an_engine_does_not_serve_yet_is_not_fused(case: Case) -> None:
    earlier = [version for version in ENGINE_VERSIONS if parse_version(version) < parse_version(case.asked_from)]
    assert [fused_shared_experts(case.model, 1, parse_version(version)) for version in earlier] == [0] * len(earlier)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.architecture)
def test_every_rule_fuses_a_model_that_an_engine_was_asked_about(rule: Any) -> None:
    assert any(rule.covers(case.model, 1) and parse_version(case.asked_from) <= rule.since for case in CASES)


def test_a_version_between_two_studied_ones_follows_the_older() -> None:
    qwen3_next = next(case.model for case in CASES if case.name == "Qwen3-Next")
    assert [fused_shared_experts(qwen3_next, 1, (0, 5, patch)) for patch in (14, 15, 16)] == [0, 1, 1]


def test_an_engine_older_than_the_studied_ones_is_refused() -> None:
    with pytest.raises(EngineError, match=r"0\.5\.7 is not supported"):
        fused_shared_experts(CASES[0].model, 1, (0, 5, 7))
