"""A lower bound on the time of what stands around the experts in a forward pass: projections, attention, dense MLPs."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_moe_ext.core import DecoderShape, Gpu, MoEModel, Quantization

PREFILL_FROM = 512
"""A batch of so many tokens or more is taken for the prefill of one prompt, a smaller one for a step of decode."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What stands around the experts of a model on one of `tp` ranks; `moe_layers` of its layers have experts."""

    decoder: DecoderShape
    moe_layers: int
    tp: int = 1


def surroundings_of(model: MoEModel, tp: int) -> Surroundings | None:
    """What stands around the experts on one rank; None where the model's config does not tell it."""
    if model.decoder is None or model.moe_layers is None:
        return None
    return Surroundings(model.decoder, model.moe_layers, tp)


@dataclass(frozen=True, slots=True)
class Batch:
    """`tokens` in one forward pass. In decode each is of a sequence of its own that is `context` tokens long."""

    tokens: int
    context: int

    @property
    def is_prefill(self) -> bool:
        return self.tokens >= PREFILL_FROM


@dataclass(frozen=True, slots=True)
class DecoderFloor:
    """Microseconds of all layers of one rank, at the roofline, without communication, norms, router and head."""

    projections_us: float
    attention_us: float
    dense_us: float
    shared_us: float

    @property
    def us(self) -> float:
        return self.projections_us + self.attention_us + self.dense_us + self.shared_us


def decoder_floor(
    around: Surroundings, quantization: Quantization, gpu: Gpu, batch: Batch, *, shares_are_fused: bool
) -> DecoderFloor:
    """The floor of the layers around the experts.

    Args:
        quantization: of the experts. Where their activations are 8 bits wide the other weights are taken to be
            multiplied in 8 bits too, otherwise in 16: a guess, as checkpoints differ.
        shares_are_fused: the engine runs shared experts with the routed ones, and they are none of this.
    """
    decoder, moe_layers, tp = around.decoder, around.moe_layers, around.tp
    bits = 8 if quantization.activation_bits == 8 else 16
    tokens = batch.tokens

    def gemm_us(columns: float, reduction: float) -> float:
        moved = (columns * reduction + tokens * reduction) * bits / 8 + tokens * columns * 2
        return max(2 * tokens * columns * reduction / gpu.tflops(bits) * 1e-6, moved / gpu.bandwidth_gbs * 1e-3)

    def mlp_us(width: float) -> float:
        return gemm_us(2 * width, decoder.hidden_size) + gemm_us(decoder.hidden_size, width) if width else 0.0

    projections = sum(gemm_us(columns, reduction) for columns, reduction in _projections(decoder, tp))
    shared_width = 0.0 if shares_are_fused else decoder.shared_width / tp
    return DecoderFloor(
        projections_us=decoder.layers * projections,
        attention_us=(decoder.layers - decoder.windowed_layers) * _attention_us(decoder, gpu, batch, tp, None)
        + decoder.windowed_layers * _attention_us(decoder, gpu, batch, tp, decoder.window),
        dense_us=max(0, decoder.layers - moe_layers) * mlp_us(decoder.dense_width / tp),
        shared_us=moe_layers * mlp_us(shared_width),
    )


def _projections(decoder: DecoderShape, tp: int) -> list[tuple[float, float]]:
    """(Columns, reduction) of each GEMM of one layer's attention on one rank."""
    heads, hidden_size = decoder.heads / tp, decoder.hidden_size
    out = (hidden_size, heads * decoder.value_dim)
    if not decoder.latent_dim:
        kv_heads = max(1.0, decoder.kv_heads / tp)
        return [(heads * decoder.query_dim + kv_heads * (decoder.query_dim + decoder.value_dim), hidden_size), out]
    # The latent vectors are computed on every rank.
    down = (decoder.query_rank + decoder.latent_dim + decoder.rope_dim, hidden_size)
    queries = (heads * decoder.query_dim, decoder.query_rank or hidden_size)
    values = (heads * (decoder.query_dim - decoder.rope_dim + decoder.value_dim), decoder.latent_dim)
    return [down, queries, values, out]


def _attention_us(decoder: DecoderShape, gpu: Gpu, batch: Batch, tp: int, window: int | None) -> float:
    """One layer, multiplied in 16 bits; in decode latent attention works on the latent vectors themselves."""
    heads = decoder.heads / tp
    if batch.is_prefill:
        seen = batch.tokens / 2 if window is None else min(batch.tokens / 2, window)
        width, kept = decoder.query_dim + decoder.value_dim, 0.0
    else:
        seen = batch.context if window is None else min(batch.context, window)
        if decoder.latent_dim:
            width = 2 * decoder.latent_dim + decoder.rope_dim
            kept = batch.tokens * seen * (decoder.latent_dim + decoder.rope_dim)
        else:
            width = decoder.query_dim + decoder.value_dim
            kept = batch.tokens * seen * max(1.0, decoder.kv_heads / tp) * width
    flop_us = 2 * batch.tokens * seen * heads * width / gpu.tflops(16) * 1e-6
    return max(flop_us, kept * 2 / gpu.bandwidth_gbs * 1e-3)
