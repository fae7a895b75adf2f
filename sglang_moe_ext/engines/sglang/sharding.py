"""How SGLang splits a model's experts over ranks: the E, N and top-k that a rank's kernel sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sglang_moe_ext.core import EngineError, ModelError, MoEModel, MoEShape, Parallelism, Quantization
from sglang_moe_ext.engines.weight_only import halve_group

Version = tuple[int, int, int]

OLDEST_STUDIED: Version = (0, 5, 8)


@dataclass(frozen=True, slots=True)
class FusionRule:
    """When one architecture fuses its single shared expert; `until` is the first studied version that no longer does.

    `architecture` is architectures[0] of config.json, before the engine renames it; `source` is under sglang/srt.
    """

    architecture: str
    since: Version
    source: str
    why: str
    routed_experts: int | None = None
    under_ep: bool = False
    until: Version | None = None

    def holds_in(self, engine_version: Version) -> bool:
        return self.since <= engine_version and (self.until is None or engine_version < self.until)

    def covers(self, model: MoEModel, ep: int) -> bool:
        return (
            model.architecture == self.architecture
            and model.shared_experts == 1  # CUDA routers append one shared slot; more than one is refused or asserted
            and self.routed_experts in (None, model.routed_experts)
            and (ep == 1 or self.under_ep)
        )


_NO_EP = "the gate asks for one shared expert and no expert parallelism"
_V3 = "the gate of DeepSeek V3/R1: 256 routed experts, one shared, no expert parallelism"
_BAILING = "the gate asks for one shared expert of the routed experts' size; expert parallelism does not matter"

RULES: tuple[FusionRule, ...] = (
    FusionRule("DeepseekV3ForCausalLM", (0, 5, 8), "models/deepseek_v2.py", _V3, routed_experts=256),
    FusionRule(
        "DeepseekV32ForCausalLM",
        (0, 5, 8),
        "utils/hf_transformers_utils.py",
        "the pinned transformers does not know deepseek_v32, so the config is renamed to DeepseekV3ForCausalLM; "
        "0.5.12 registers the type, the name stays, and the gate of V3 turns it down",
        routed_experts=256,
        until=(0, 5, 12),
    ),
    FusionRule("GlmMoeDsaForCausalLM", (0, 5, 10), "models/glm4_moe.py", _V3, routed_experts=256),
    FusionRule("Glm4MoeForCausalLM", (0, 5, 8), "models/glm4_moe.py", _NO_EP),
    FusionRule("Glm4MoeLiteForCausalLM", (0, 5, 8), "models/glm4_moe_lite.py", _NO_EP),
    FusionRule("Glm4vMoeForConditionalGeneration", (0, 5, 8), "models/glm4v_moe.py", _NO_EP),
    FusionRule(
        "Qwen3NextForCausalLM",
        (0, 5, 15),
        "models/qwen2_moe.py, models/qwen3_next.py",
        "alone in enabling the MoE block's fusion on CUDA; asks for a shared expert of the routed experts' size",
        under_ep=True,
    ),
    FusionRule("MiniMaxM3SparseForCausalLM", (0, 5, 18), "models/minimax_m3.py", _NO_EP),
    FusionRule("MiniMaxM3SparseForConditionalGeneration", (0, 5, 18), "models/minimax_m3_vl.py", _NO_EP),
    FusionRule("BailingMoeV3ForCausalLM", (0, 5, 20), "models/bailing_moe_v3.py", _BAILING, under_ep=True),
    FusionRule(
        "BailingMoeV3VLForConditionalGeneration", (0, 5, 23), "models/bailing_mm_v3.py", _BAILING, under_ep=True
    ),
    FusionRule("Dots3NoteForCausalLM", (0, 5, 20), "models/dots3_common/modeling.py", _V3, routed_experts=256),
    FusionRule("Glm5NextForConditionalGeneration", (0, 5, 20), "models/glm5_next.py", _NO_EP),
)


def fused_shared_experts(model: MoEModel, ep: int, engine_version: Version) -> int:
    """Experts, and top-k slots, that the engine adds for shared experts.

    `model.shared_experts` counts experts of the routed experts' intermediate size: one twice as wide counts as 2.

    Raises:
        EngineError: the engine is older than the oldest one studied.
    """
    if engine_version < OLDEST_STUDIED:
        raise EngineError(
            f"sglang {_text(engine_version)} is not supported: what it fuses is known from {_text(OLDEST_STUDIED)} on; "
            "upgrade sglang"
        )
    fuses = any(rule.holds_in(engine_version) and rule.covers(model, ep) for rule in RULES)
    return model.shared_experts if fuses else 0


def _text(version: Version) -> str:
    return ".".join(map(str, version))


NEWEST = (0, 5, 23)
"""The newest release whose rules were checked."""
_METHODS_OF_WNA16 = (None, "awq", "auto_round", "moe_wna16")
"""Checkpoints whose experts MoeWNA16Method takes where Marlin does not, and halves their groups; None: not known."""


def launched_shape(
    model: MoEModel,
    parallelism: Parallelism,
    *,
    engine_version: tuple[int, int, int] = NEWEST,
    fuse_shared_experts: bool = True,
) -> MoEShape:
    """The layer that one rank launches.

    Raises:
        ModelError: the split is not even, cuts through a quantization block, or the engine serves no such checkpoint.
    """
    model = read_as(model, engine_version)
    tp, ep = parallelism.tp, parallelism.ep
    if tp < 1 or ep < 1 or tp % ep:
        raise ModelError(f"--tp-size {tp} with --ep-size {ep}: expected positive sizes with tp divisible by ep")
    if model.routed_experts % ep:
        raise ModelError(f"{model.name} has {model.routed_experts} experts: --ep-size {ep} does not divide them")
    if model.intermediate_size % parallelism.moe_tp:
        raise ModelError(
            f"{model.name} has an expert intermediate size of {model.intermediate_size}: "
            f"--tp-size {tp} with --ep-size {ep} would cut it into {parallelism.moe_tp} uneven parts; "
            "choose a size that divides it"
        )
    intermediate_size = model.intermediate_size // parallelism.moe_tp
    block = model.quantization.block_shape
    if block is not None and block[0] and intermediate_size % block[0]:
        raise ModelError(
            f"{model.name}: {intermediate_size} columns a rank are no multiple of its block {list(block)}; "
            f"SGLang refuses --tp-size {tp} for it; use a smaller --tp-size, or --ep-size"
        )
    quantization = model.quantization
    method = None if quantization.checkpoint is None else quantization.checkpoint.method
    if method in _METHODS_OF_WNA16:
        quantization = halve_group(quantization, intermediate_size, model.hidden_size, model.name, "SGLang")
    fused = fused_shared_experts(model, ep, engine_version) if fuse_shared_experts else 0
    return MoEShape(
        experts=model.routed_experts // ep + fused,
        intermediate_size=intermediate_size,
        hidden_size=model.hidden_size,
        top_k=model.top_k + fused,
        quantization=quantization,
        dtype="float16" if model.dtype == "float32" else model.dtype,
        gated=model.gated,
        ep=ep,
        fused_shared=fused,
        zero_experts=model.zero_experts,
    )


def read_as(model: MoEModel, engine_version: Version) -> MoEModel:
    """The model as that release reads its checkpoint.

    Raises:
        ModelError: the engine raises when it loads such experts.
    """
    older = next((it for it in model.older_readings if engine_version < it.before), None)
    model = model if older is None else replace(model, quantization=older.quantization)
    refused = next((it for it in _REFUSED if it.applies(model.quantization)), None)
    if refused is not None:
        raise ModelError(f"{model.name}: {refused.why}; use vLLM, or another checkpoint of the model")
    return model


@dataclass(frozen=True, slots=True)
class RefusedCheckpoint:
    """A kind of checkpoint that SGLang raises for while it loads. Read in 0.5.8 to 0.5.23, layers/quantization."""

    why: str
    applies: Callable[[Quantization], bool]


def _is_int8_of_compressed_tensors(quantization: Quantization) -> bool:
    stored = quantization.checkpoint
    return quantization.scheme == "int8_w8a8" and stored is not None and stored.method == "compressed_tensors"


def _is_asymmetric_gptq(quantization: Quantization) -> bool:
    stored = quantization.checkpoint
    return stored is not None and stored.method == "gptq" and not stored.symmetric


_REFUSED = (
    RefusedCheckpoint(
        "SGLang serves int8 experts with int8 activations of compressed-tensors on NPUs alone, and raises "
        "NotImplementedError on a GPU",
        _is_int8_of_compressed_tensors,
    ),
    RefusedCheckpoint("SGLang runs GPTQ experts by Marlin alone, which takes no asymmetric ones", _is_asymmetric_gptq),
)
