"""A layer of random weights on the GPU, and what one launch of it takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sglang_moe_ext.core import PROJECTIONS, MoEShape, Projection, TileConfig
from sglang_moe_ext.engines.sglang.kernel import Engine, GemmTensors, sorted_rows
from sglang_moe_ext.engines.sglang.whole_layer import LayerTensors
from sglang_moe_ext.kernels import reference
from sglang_moe_ext.kernels.scales import quantise_weights
from sglang_moe_ext.tuning import routing
from sglang_moe_ext.tuning.routing import Routing

if TYPE_CHECKING:
    import torch

ROUTINGS = 4
"""Routings that the samples of one batch size take turns with, so that no expert's weights stay in a cache."""
_CHECKED_TOKENS = 2048
"""The reference is held against the first so many tokens, since it takes float32 copies of all that it reads; against
all where one scale, and so each token, depends on all of them."""


@dataclass(frozen=True, slots=True)
class Weights:
    """One projection's weights [experts, columns, reduction] as the engine stores them, and their scales."""

    stored: torch.Tensor
    scale: torch.Tensor | None


@dataclass(slots=True)
class Batch:
    """Inputs of one batch size: hidden [tokens, hidden], routings, and their sorted forms by BLOCK_SIZE_M.

    `inner` and `out` serve GEMMs alone: what the down GEMM reads, with rows enough for any order, and what each writes.
    """

    tokens: int
    hidden: torch.Tensor
    inner: torch.Tensor
    out: dict[Projection, torch.Tensor]
    routings: list[Routing]
    aligned: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class Layer:
    """One MoE layer of the shape, with random weights that are made once."""

    def __init__(
        self, engine: Engine, shape: MoEShape, source: routing.Source, seed: int, device: str = "cuda"
    ) -> None:
        import torch

        self.engine, self.shape, self.source, self.seed, self.device = engine, shape, source, seed, device
        self._dtype: torch.dtype = getattr(torch, shape.dtype)
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self.weights = {projection: self._weights(*shape.gemm(projection)) for projection in PROJECTIONS}

    def _random(self, *size: int) -> torch.Tensor:
        import torch

        return torch.randn(*size, generator=self._generator, device=self.device, dtype=self._dtype)

    def _weights(self, columns: int, reduction: int) -> Weights:
        import torch

        weights = torch.empty(self.shape.experts, columns, reduction, device=self.device, dtype=self._dtype)
        for expert in weights:
            expert.copy_(self._random(columns, reduction) / reduction**0.5)
        if self.shape.quantisation.scheme is None:
            return Weights(weights, None)
        return Weights(*quantise_weights(weights, self.shape.quantisation))

    def batch(self, tokens: int, seed: int, largest_block_m: int = 256) -> Batch:
        """Fresh inputs for that many tokens."""
        import torch

        shape = self.shape
        return Batch(
            tokens=tokens,
            hidden=self._random(tokens, shape.hidden_size),
            inner=self._random(sorted_rows(shape, tokens, largest_block_m), shape.intermediate_size),
            out={
                projection: torch.empty(
                    tokens, shape.top_k, shape.gemm(projection)[0], device=self.device, dtype=self._dtype
                )
                for projection in PROJECTIONS
            },
            routings=routing.routings(self.source, shape, tokens, ROUTINGS, seed, self.device),
        )

    def gemm(self, batch: Batch, projection: Projection, config: TileConfig, turn: int) -> GemmTensors:
        """The tensors of the `turn`th launch of one GEMM alone: routings take turns."""
        index = turn % ROUTINGS
        chosen = batch.routings[index]
        aligned = batch.aligned.get((index, config.block_m))
        if aligned is None:
            aligned = self.engine.align(chosen.topk_ids, config.block_m, self.shape.experts)
            batch.aligned[index, config.block_m] = aligned
        rows = batch.tokens * self.shape.top_k
        if config.use_tma:
            rows = sorted_rows(self.shape, batch.tokens, config.block_m)
        return GemmTensors(
            a=batch.hidden if projection == "up" else batch.inner[:rows],
            weights=self.weights[projection].stored,
            out=batch.out[projection],
            weight_scale=self.weights[projection].scale,
            topk_weights=chosen.topk_weights,
            topk_ids=chosen.topk_ids,
            sorted_token_ids=aligned[0],
            expert_ids=aligned[1],
            num_tokens_post_padded=aligned[2],
        )

    def whole(self, batch: Batch, turn: int) -> LayerTensors:
        """The tensors of the `turn`th run of the whole layer."""
        chosen = batch.routings[turn % ROUTINGS]
        return LayerTensors(
            hidden=batch.hidden,
            w1=self.weights["up"].stored,
            w2=self.weights["down"].stored,
            w1_scale=self.weights["up"].scale,
            w2_scale=self.weights["down"].scale,
            topk_weights=chosen.topk_weights,
            topk_ids=chosen.topk_ids,
        )

    def error(self, batch: Batch, turn: int, out: torch.Tensor) -> float:
        """Relative error of what the whole layer gave, [tokens, hidden], against the reference."""
        tensors = self.whole(batch, turn)
        if not bool(out.isfinite().all()):
            return float("inf")
        quantisation = self.shape.quantisation
        has_one_scale = quantisation.activation_bits == 8 and not (quantisation.block_shape or quantisation.per_channel)
        tokens = batch.tokens if has_one_scale else min(batch.tokens, _CHECKED_TOKENS)
        expected = reference.moe_layer(
            tensors.hidden[:tokens],
            tensors.w1,
            tensors.w2,
            tensors.topk_weights[:tokens],
            tensors.topk_ids[:tokens],
            quantisation=quantisation,
            w1_scale=tensors.w1_scale,
            w2_scale=tensors.w2_scale,
            activation="silu" if self.shape.gated else "relu2",
            gated=self.shape.gated,
        )
        return reference.relative_error(out[:tokens], expected)
