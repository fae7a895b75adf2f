"""Which experts the tokens of a test batch take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglang_moe_ext.core import MoEShape

if TYPE_CHECKING:
    import torch

REMOTE = -1
"""The id of an expert that lies on another rank."""


@dataclass(frozen=True, slots=True)
class Routing:
    """topk_ids int32 and topk_weights float32, both [tokens, topk]; an id is -1 where another rank has the expert."""

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


Make = Callable[[MoEShape, int, int, str], Routing]
"""Makes one routing of a layer: for that many tokens, by that seed, on that device."""


@dataclass(frozen=True, slots=True)
class RoutingSource:
    """Where the routings of a batch come from: its makers take turns. `name` says which in a run's circumstances.

    It goes to the measuring processes by pickle, so a maker is a function of a module or an object that is its data.
    """

    name: str
    makers: tuple[Make, ...]


def uniform(shape: MoEShape, tokens: int, seed: int, device: str) -> Routing:
    """Each token takes different routed experts, all equally likely, and then each fused shared expert."""
    import torch

    generator = torch.Generator(device=device).manual_seed(seed)
    scores = torch.rand(tokens, routed_experts(shape), generator=generator, device=device)
    return _of_highest(scores, shape, generator)


def zipf(shape: MoEShape, tokens: int, seed: int, device: str, exponent: float = 1.0) -> Routing:
    """As `uniform`, but the n-th most popular expert draws tokens as n**-exponent; the seed says which is the n-th."""
    import torch

    generator = torch.Generator(device=device).manual_seed(seed)
    experts = routed_experts(shape)
    rank = 1 + torch.randperm(experts, generator=generator, device=device)
    # Gumbel noise on the log of a popularity: the highest scores are a draw without replacement by popularity.
    noise = -torch.rand(tokens, experts, generator=generator, device=device).log().neg().log()
    return _of_highest(noise - exponent * rank.log(), shape, generator)


def routed_experts(shape: MoEShape) -> int:
    """Routed experts of all ranks together."""
    return (shape.experts - shape.fused_shared) * shape.ep


def weighted(ids: torch.Tensor, generator: torch.Generator) -> Routing:
    """The routing of these int32 ids, with random weights that add up to one for each token."""
    import torch

    weights = torch.rand(ids.shape, generator=generator, device=ids.device) + 0.1
    return Routing(ids, (weights / weights.sum(dim=1, keepdim=True)).contiguous())


def _of_highest(scores: torch.Tensor, shape: MoEShape, generator: torch.Generator) -> Routing:
    """What the first rank sees of tokens [tokens, routed experts] that take the experts of their highest scores."""
    import torch

    local = shape.experts - shape.fused_shared
    ids = scores.topk(shape.top_k - shape.fused_shared, dim=1).indices
    ids = torch.where(ids < local, ids, REMOTE)
    shared = torch.arange(local, shape.experts, device=scores.device).expand(len(scores), -1)
    return weighted(torch.cat((ids, shared), dim=1).to(torch.int32).contiguous(), generator)


UNIFORM = RoutingSource("uniform", (uniform,))
ZIPF = RoutingSource("zipf", (zipf,))
MIXED = RoutingSource("mixed", (uniform, zipf))
SOURCES = {source.name: source for source in (MIXED, UNIFORM, ZIPF)}
NAMES = tuple(SOURCES)


def routings(source: RoutingSource, shape: MoEShape, tokens: int, count: int, seed: int, device: str) -> list[Routing]:
    """The routings that the samples of one batch take turns with; no two seeds share one of the same source."""
    makers = source.makers
    return [makers[turn % len(makers)](shape, tokens, seed * count + turn, device) for turn in range(count)]
