"""A layer of random weights on the GPU, and the tensors of one launch of one of its GEMMs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sglang_moe_ext.core import PROJECTIONS, MoEShape, Projection
from sglang_moe_ext.engines.sglang.kernel import Engine, GemmTensors
from sglang_moe_ext.kernels import reference
from sglang_moe_ext.kernels.scales import Scales, quantise_activations, quantise_weights
from sglang_moe_ext.tuning import routing
from sglang_moe_ext.tuning.routing import Routing

if TYPE_CHECKING:
    import torch

ROUTINGS = 4
"""Routings that the samples of one batch size take turns with, so that no expert's weights stay in a cache."""


@dataclass(frozen=True, slots=True)
class Weights:
    """One projection's weights [experts, columns, reduction] as the engine stores them, and their scales."""

    stored: torch.Tensor
    scale: torch.Tensor | None


@dataclass(slots=True)
class Batch:
    """Inputs of one batch size: activations of both GEMMs, routings, and their sorted forms by BLOCK_SIZE_M."""

    tokens: int
    activations: dict[Projection, torch.Tensor]
    out: dict[Projection, torch.Tensor]
    routings: list[Routing]
    aligned: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class Layer:
    """One MoE layer of the shape, with random weights that are made once."""

    def __init__(self, engine: Engine, shape: MoEShape, seed: int, device: str = "cuda") -> None:
        import torch

        self.engine, self.shape, self.seed, self.device = engine, shape, seed, device
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

    def batch(self, tokens: int, seed: int) -> Batch:
        """Fresh inputs for that many tokens."""
        import torch

        slots = tokens * self.shape.top_k
        return Batch(
            tokens=tokens,
            activations={
                "up": self._random(tokens, self.shape.hidden_size),
                "down": self._random(slots, self.shape.intermediate_size),
            },
            out={
                projection: torch.empty(
                    tokens, self.shape.top_k, self.shape.gemm(projection)[0], device=self.device, dtype=self._dtype
                )
                for projection in PROJECTIONS
            },
            routings=[
                routing.uniform(self.shape, tokens, seed * ROUTINGS + index, self.device) for index in range(ROUTINGS)
            ],
        )

    def gemm(self, batch: Batch, projection: Projection, block_m: int, turn: int) -> GemmTensors:
        """The tensors of the `turn`th launch: routings take turns."""
        index = turn % ROUTINGS
        chosen = batch.routings[index]
        aligned = batch.aligned.get((index, block_m))
        if aligned is None:
            aligned = self.engine.align(chosen.topk_ids, block_m, self.shape.experts)
            batch.aligned[index, block_m] = aligned
        return GemmTensors(
            a=batch.activations[projection],
            weights=self.weights[projection].stored,
            out=batch.out[projection],
            weight_scale=self.weights[projection].scale,
            topk_weights=chosen.topk_weights,
            topk_ids=chosen.topk_ids,
            sorted_token_ids=aligned[0],
            expert_ids=aligned[1],
            num_tokens_post_padded=aligned[2],
        )

    def expected(self, batch: Batch, projection: Projection, turn: int) -> torch.Tensor:
        """What the launch must write, [tokens, topk, columns] float32, by the reference."""
        chosen = batch.routings[turn % ROUTINGS]
        weights, activations = self.weights[projection], batch.activations[projection]
        scales = None
        if weights.scale is not None:
            activations, activation_scale = quantise_activations(activations, self.shape.quantisation)
            scales = Scales(self.shape.quantisation, activation_scale, weights.scale)
        rows = reference.grouped_gemm(
            activations,
            weights.stored,
            chosen.topk_ids,
            top_k=self.shape.top_k if projection == "up" else 1,
            scales=scales,
            routed_weights=chosen.topk_weights if projection == "down" else None,
        )
        return rows.view(batch.tokens, self.shape.top_k, -1)
