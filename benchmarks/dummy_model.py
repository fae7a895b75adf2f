"""Write a model folder that an engine serves with `--load-format dummy`: a real config of few layers, a toy tokenizer.

usage: python benchmarks/dummy_model.py OUT glm_4_7_flash|qwen3_30b_a3b|qwen3_30b_a3b_fp8 [LAYERS]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def glm_4_7_flash() -> PreTrainedConfig:
    """The class defaults are the checkpoint's numbers."""
    from transformers.models.glm4_moe_lite import Glm4MoeLiteConfig

    config = Glm4MoeLiteConfig()
    config.architectures = ["Glm4MoeLiteForCausalLM"]
    return config


def qwen3_30b_a3b() -> PreTrainedConfig:
    """Numbers of the published config.json."""
    from transformers.models.qwen3_moe import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        vocab_size=151936,
        intermediate_size=6144,
        max_position_embeddings=40960,
    )
    config.architectures = ["Qwen3MoeForCausalLM"]
    return config


FP8_BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
MODELS: dict[str, tuple[Callable[[], PreTrainedConfig], dict[str, Any]]] = {
    "glm_4_7_flash": (glm_4_7_flash, {"first_k_dense_replace": 1}),  # SGLang reads it, transformers 5 does not write it
    "qwen3_30b_a3b": (qwen3_30b_a3b, {}),
    "qwen3_30b_a3b_fp8": (qwen3_30b_a3b, {"quantization_config": FP8_BLOCK}),
}


def write_tokenizer(folder: Path) -> None:
    """A thousand words and one for the rest."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"word{number}": number for number in range(1000)} | {"<unk>": 1000}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict.fromkeys(("unk_token", "eos_token", "bos_token", "pad_token"), "<unk>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def write(folder: Path, model: str, layers: int | None = None) -> None:
    """The folder of one of MODELS, with so many layers where it shall not have all."""
    make, extra = MODELS[model]
    config = make()
    if layers is not None:
        config.num_hidden_layers = layers
        if hasattr(config, "mlp_layer_types"):
            config.mlp_layer_types = ["dense"] + ["sparse"] * (layers - 1)
    folder.mkdir(parents=True, exist_ok=True)
    document = config.to_dict() | {"dtype": "bfloat16", "torch_dtype": "bfloat16"} | extra
    (folder / "config.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    write_tokenizer(folder)


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[2] not in MODELS:
        sys.exit(__doc__)
    write(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)


if __name__ == "__main__":
    main()
