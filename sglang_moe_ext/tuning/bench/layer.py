"""A layer of random weights on the GPU, and what one launch of it takes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sglang_moe_ext.core import PROJECTIONS, MoEShape, Projection, TileConfig
from sglang_moe_ext.engines.adapter import EngineAdapter, Sorted
from sglang_moe_ext.engines.tensors import GemmTensors, LayerTensors
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.kernel_plans import padded_rows
from sglang_moe_ext.kernels import reference
from sglang_moe_ext.kernels.quantize import quantize_weights, to_fnuz
from sglang_moe_ext.tuning.bench import routing
from sglang_moe_ext.tuning.bench.routing import Routing

if TYPE_CHECKING:
    import torch

ROUTINGS = 4
"""Routings that the samples of one batch size take turns with, so that no expert's weights stay in a cache."""
_CHECKED_TOKENS = 2048
"""The reference is held against so many tokens, since it takes float32 copies of all that it reads; against all where
one scale, and so each token, depends on all of them."""
_LARGEST_BLOCK_M = 256


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One projection's weights [experts, columns, reduction] as the engine stores them, and their scales."""

    stored: torch.Tensor
    scale: torch.Tensor | None = None


@dataclass(slots=True)
class LayerBatch:
    """Inputs of one batch size: hidden [tokens, hidden], routings, and their sorted forms by BLOCK_SIZE_M.

    `inner` and `out` serve GEMMs alone, and are made for the first of them: what the down GEMM reads, with rows enough
    for any order, and what each writes.
    """

    tokens: int
    seed: int
    hidden: torch.Tensor
    routings: list[Routing]
    inner: torch.Tensor | None = None
    out: dict[Projection, torch.Tensor] = field(default_factory=dict)
    aligned: dict[tuple[int, int], Sorted] = field(default_factory=dict)

    def drop_gemms(self) -> None:
        """Make room for the whole layer, which allocates its own."""
        self.inner = None
        self.out.clear()


def _stores_fnuz(device: str) -> bool:
    """Whether the engines turn float8 weights into AMD's kind of them, on the GPU of this process."""
    import torch

    if torch.version.hip is None:
        return False
    here = specs.describe(torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device))
    return here.target.fp8_dtype == "float8_e4m3fnuz"


class BenchedLayer:
    """One MoE layer of the shape, with random weights that are made once; `engine` is what `adapter.load` gave."""

    def __init__(
        self,
        engine: Any,
        shape: MoEShape,
        source: routing.RoutingSource,
        seed: int,
        *,
        adapter: EngineAdapter,
        device: str = "cuda",
    ) -> None:
        import torch

        self.engine, self.adapter, self.shape, self.source, self.device = engine, adapter, shape, source, device
        self._dtype: torch.dtype = getattr(torch, shape.dtype)
        generator = self._generator(seed, "weights")
        self.weights = {projection: self._weights(generator, *shape.gemm(projection)) for projection in PROJECTIONS}

    def _generator(self, seed: int, what: str) -> torch.Generator:
        """One for each purpose: the same numbers as inputs and as weights would make a layer like no other."""
        import torch

        return torch.Generator(device=self.device).manual_seed(random.Random(f"{seed} {what}").getrandbits(62))

    def _random(self, generator: torch.Generator, *size: int) -> torch.Tensor:
        import torch

        return torch.randn(*size, generator=generator, device=self.device, dtype=self._dtype)

    def _weights(self, generator: torch.Generator, columns: int, reduction: int) -> LayerWeights:
        """Expert by expert: all of them in 16 bits, beside what becomes of them, may not fit."""
        whole: list[torch.Tensor] = []
        for expert in range(self.shape.experts):
            parts = self._expert(generator, columns, reduction)
            if not whole:
                whole = [part.new_empty(self.shape.experts, *part.shape[1:]) for part in parts]
            for every, part in zip(whole, parts, strict=True):
                every[expert] = part[0]
        return LayerWeights(*whole)

    def _expert(self, generator: torch.Generator, columns: int, reduction: int) -> tuple[torch.Tensor, ...]:
        """The weights of one expert, [1, columns, reduction], and its scales where they are quantized."""
        import torch

        weights = self._random(generator, 1, columns, reduction).div_(reduction**0.5)
        quantization = self.shape.quantization
        if quantization.scheme is None:
            return (weights,)
        stored, scale = quantize_weights(weights, quantization)
        if stored.dtype is torch.float8_e4m3fn and _stores_fnuz(self.device):
            return to_fnuz(stored, scale)
        return stored, scale

    def batch(self, tokens: int, seed: int) -> LayerBatch:
        """Inputs for that many tokens; each seed has its own."""
        return LayerBatch(
            tokens=tokens,
            seed=seed,
            hidden=self._random(self._generator(seed, "hidden"), tokens, self.shape.hidden_size),
            routings=[
                replace(made, topk_ids=self.adapter.seen_ids(self.shape, made.topk_ids))
                for made in routing.routings(self.source, self.shape, tokens, ROUTINGS, seed, self.device)
            ],
        )

    def _inner(self, batch: LayerBatch) -> torch.Tensor:
        if batch.inner is None:
            rows = padded_rows(batch.tokens * self.shape.top_k, self.shape.experts, _LARGEST_BLOCK_M)
            batch.inner = self._random(self._generator(batch.seed, "inner"), rows, self.shape.intermediate_size)
        return batch.inner

    def _out(self, batch: LayerBatch, projection: Projection) -> torch.Tensor:
        if projection not in batch.out:
            size = (batch.tokens, self.shape.top_k, self.shape.gemm(projection)[0])
            batch.out[projection] = batch.hidden.new_empty(size)
        return batch.out[projection]

    def gemm(self, batch: LayerBatch, projection: Projection, config: TileConfig, turn: int) -> GemmTensors:
        """The tensors of the `turn`th launch of one GEMM alone: routings take turns."""
        index = turn % ROUTINGS
        chosen = batch.routings[index]
        aligned = batch.aligned.get((index, config.block_m))
        if aligned is None:
            aligned = self.adapter.sort(self.engine, self.shape, chosen.topk_ids, config.block_m)
            batch.aligned[index, config.block_m] = aligned
        rows = batch.tokens * self.shape.top_k
        if config.use_tma:
            rows = padded_rows(batch.tokens * self.shape.top_k, self.shape.experts, config.block_m)
        return GemmTensors(
            a=batch.hidden if projection == "up" else self._inner(batch)[:rows],
            weights=self.weights[projection].stored,
            out=self._out(batch, projection),
            weight_scale=self.weights[projection].scale,
            topk_weights=chosen.topk_weights,
            topk_ids=chosen.topk_ids,
            sorted_token_ids=aligned[0],
            expert_ids=aligned[1],
            num_tokens_post_padded=aligned[2],
        )

    def whole(self, batch: LayerBatch, turn: int) -> LayerTensors:
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

    def error(self, batch: LayerBatch, turn: int, out: torch.Tensor, *, quantizes_activations: bool = True) -> float:
        """Relative error of what the whole layer gave, [tokens, hidden], against the reference.

        `quantizes_activations`: as the scheme says; else the reference takes them as they are.
        """
        tensors = self.whole(batch, turn)
        if not bool(out.isfinite().all()):
            return float("inf")
        quantization = self.shape.quantization
        has_one_scale = quantization.activation_bits == 8 and not (quantization.block_shape or quantization.per_channel)
        rows = checked_rows(batch.tokens, batch.tokens if has_one_scale else _CHECKED_TOKENS).to(self.device)
        ids = tensors.topk_ids[rows]
        expected = reference.moe_layer(
            tensors.hidden[rows],
            tensors.w1,
            tensors.w2,
            tensors.topk_weights[rows],
            ids.masked_fill(ids >= self.shape.experts, routing.REMOTE),  # an engine may number those of all ranks
            quantization=quantization,
            w1_scale=tensors.w1_scale,
            w2_scale=tensors.w2_scale,
            activation="silu" if self.shape.gated else "relu2",
            gated=self.shape.gated,
            quantizes_activations=quantizes_activations,
        )
        return reference.relative_error(out[rows], expected)


def checked_rows(tokens: int, most: int) -> torch.Tensor:
    """Up to so many of the batch's rows, spread evenly from the first to the last."""
    import torch

    count = min(tokens, most)
    return torch.arange(count) * (tokens - 1) // max(count - 1, 1)
