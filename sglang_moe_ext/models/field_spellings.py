"""Names of the config fields that describe experts, by family of models; a new spelling is a word or a row here."""

from __future__ import annotations

from dataclasses import dataclass

Names = tuple[str, ...]

EXPERTS: Names = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
TOP_K: Names = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "moe_router_topk",
)
WIDTH: Names = ("moe_intermediate_size", "expert_ffn_hidden_size", "expert_hidden_dim")
DENSE_WIDTH: Names = ("intermediate_size", "ffn_hidden_size")
"""Width of an expert in a model that states none of WIDTH; otherwise width of its dense layers."""
HIDDEN: Names = ("moe_latent_size", "routed_expert_hidden_size", "hidden_size", "d_model")
SHARED: Names = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
SHARED_WIDTH: Names = ("shared_expert_intermediate_size",)
PARTS: Names = ("ffn_config",)
"""Sections that hold the numbers of the experts, but not the hidden size of the model around them."""

NOT_GATED = ("relu2",)
"""Activations whose experts have no gate: w1 is as wide as the expert."""


@dataclass(frozen=True, slots=True)
class Family:
    """How the field names of a family differ from the common ones. `keys` are model types and architectures.

    With `layer_lists`, a model is dense if its list of layers has none of `moe_layers`.
    """

    keys: Names
    why: str
    width: Names = WIDTH
    dense_width: Names = DENSE_WIDTH
    merged_width: Names = ()
    hidden: Names = HIDDEN
    shared: Names = SHARED
    gated: bool = True
    text_comes_first: bool = False
    layer_lists: Names = ()
    moe_layers: Names = ()
    runs_fused_moe: bool = True


COMMON = Family(keys=(), why="the names that most models share")

_DEPARTURES = (
    Family(
        keys=(
            "aria_text",
            "cohere2_moe",
            "flex_olmo",
            "gpt_oss",
            "granitemoe",
            "granitemoe_swa",
            "granitemoehybrid",
            "granitemoeshared",
            "iquest_q1",
            "jamba",
            "jetmoe",
            "llama4_text",
            "minimax",
            "minimax_m2",
            "minimax_m3_vl_text",
            "mixtral",
            "olmoe",
            "openai_privacy_filter",
            "phimoe",
        ),
        why="intermediate_size is the width of an expert; dense layers, if any, have another name",
        width=(*WIDTH, "intermediate_size"),
        dense_width=(),
    ),
    Family(
        keys=("hunyuan_v1_moe", "hunyuan"),
        why="without moe_intermediate_size, intermediate_size is an expert's; either may be a list, one a layer",
        width=("moe_intermediate_size", "intermediate_size"),
        dense_width=(),
    ),
    Family(
        keys=("ernie4_5_vl_moe", "ernie4_5_vl_moe_text", "ernie4_5_moe_vl", "Ernie4_5_VLMoeForConditionalGeneration"),
        why="lists of two: the experts of text tokens, then those of image tokens",
        text_comes_first=True,
    ),
    Family(
        keys=("nemotron_h", "NemotronHForCausalLM", "nemotron_h_puzzle", "NemotronHPuzzleForCausalLM"),
        why="experts without a gate (relu2), in the latent space where there is one; the shared one has its own width",
        gated=False,
        shared=(),
        layer_lists=("layers_block_type", "hybrid_override_pattern"),
        moe_layers=("moe", "E"),
    ),
    Family(
        keys=("dbrx", "DbrxForCausalLM"),
        why="the experts' numbers lie in ffn_config, whose own hidden_size is a default that no checkpoint means",
        width=("ffn_hidden_size",),
        dense_width=(),
    ),
    Family(
        keys=("muse_spark_text",),
        why="experts work in moe_hidden_size, between two projections",
        hidden=("moe_hidden_size", *HIDDEN),
    ),
    Family(
        keys=("longcat_flash", "LongcatFlashForCausalLM"),
        why="zero experts are a choice of the router, not weights; ffn_hidden_size is the dense layers'",
        dense_width=(),
    ),
    Family(
        keys=("zaya", "ZayaForCausalLM"),
        why="ffn_hidden_size is gate and up together (SGLang 0.5.23, models/zaya.py)",
        dense_width=(),
        merged_width=("ffn_hidden_size",),
    ),
    Family(
        keys=("doge",),
        why="its 'experts' are rows of an embedding",
        runs_fused_moe=False,
    ),
)

FAMILIES: dict[str, Family] = {key: family for family in _DEPARTURES for key in family.keys}
