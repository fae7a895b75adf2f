"""A Qwen3Moe of two layers with random weights and a tokenizer of bytes: all that a server needs, in a megabyte."""

from __future__ import annotations

from pathlib import Path

LAYERS, EXPERTS, TOP_K, HIDDEN_SIZE, INTERMEDIATE_SIZE = 2, 8, 2, 64, 32
END, PAD = "<|endoftext|>", "<pad>"


def save(folder: Path) -> None:
    """Write the model and its tokenizer; the same bits each time."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokens = _save_tokenizer(folder)
    config = Qwen3MoeConfig(
        vocab_size=320,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=128,
        moe_intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.2,  # so large that the tokens depend on the experts
        bos_token_id=None,
        eos_token_id=tokens[END],
        pad_token_id=tokens[PAD],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def _save_tokenizer(folder: Path) -> dict[str, int]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = {token: at for at, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), END, PAD])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD).save_pretrained(folder)
    return tokens
