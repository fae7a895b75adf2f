"""The floor of the layers around the experts, against sums made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sglang_moe_ext.core import DecoderShape, Quantization
from sglang_moe_ext.gpu.decoder_roofline import Batch, DecoderFloor, Surroundings, decoder_floor
from sglang_moe_ext.gpu.names import find_gpu

GPU = find_gpu("H200")
DECODER = DecoderShape(10, 2048, heads=32, kv_heads=4, query_dim=128, value_dim=128, shared_width=1024)
LATENT = replace(DECODER, kv_heads=32, query_dim=192, latent_dim=512, query_rank=1536, rope_dim=64)
PREFILL, DECODE = Batch(8192, 1024), Batch(64, 1024)


def floor(batch: Batch, decoder: DecoderShape = DECODER, tp: int = 1, *, fused: bool = False) -> DecoderFloor:
    return decoder_floor(Surroundings(decoder, 10, tp), Quantization(), GPU, batch, shares_are_fused=fused)


def test_prefill_is_bound_by_arithmetic() -> None:
    flops = 10 * 2 * 8192 * 2048 * (32 * 128 + 2 * 4 * 128 + 32 * 128)
    assert floor(PREFILL).projections_us == pytest.approx(flops / GPU.bf16_tflops * 1e-6)


def test_attention_of_a_prompt_is_causal() -> None:
    flops = 10 * 2 * 8192 * 4096 * 32 * 256
    assert floor(PREFILL).attention_us == pytest.approx(flops / GPU.bf16_tflops * 1e-6)


def test_decode_reads_the_cache_of_every_sequence() -> None:
    moved = 10 * 64 * 1024 * 4 * 256 * 2
    assert floor(DECODE).attention_us == pytest.approx(moved / GPU.bandwidth_gbs * 1e-3)


def test_latent_attention_reads_one_vector_a_token() -> None:
    shorter = Batch(8, 1024)
    assert floor(shorter, LATENT).attention_us == pytest.approx(10 * 8 * 1024 * 576 * 2 / GPU.bandwidth_gbs * 1e-3)


def test_a_window_bounds_what_is_seen() -> None:
    windowed = replace(DECODER, windowed_layers=10, window=128)
    assert floor(DECODE, windowed).attention_us == pytest.approx(floor(DECODE).attention_us / 8)


def test_shared_experts_that_are_fused_are_none_of_the_rest() -> None:
    assert floor(PREFILL, fused=True).shared_us == 0 < floor(PREFILL).shared_us


def test_ranks_share_the_heads() -> None:
    assert floor(PREFILL, tp=4).attention_us == pytest.approx(floor(PREFILL).attention_us / 4)


def test_layers_without_experts_have_a_dense_mlp() -> None:
    with_dense = replace(DECODER, layers=12, dense_width=6144)
    flops = 2 * 2 * 8192 * 2048 * 3 * 6144
    assert floor(PREFILL, with_dense).dense_us == pytest.approx(flops / GPU.bf16_tflops * 1e-6)
