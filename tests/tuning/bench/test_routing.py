"""Synthetic routing is what a router could have said: properties of each token, and of the experts' popularity."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext.core import MoEShape
from sglang_moe_ext.tuning.bench import routing
from sglang_moe_ext.tuning.bench.routing import MIXED, REMOTE, SOURCES, UNIFORM, ZIPF, Routing, RoutingSource

SHAPE = MoEShape(128, 768, 2048, 8)


@st.composite
def shapes(draw: st.DrawFn) -> MoEShape:
    """Layers of any number of experts, ranks and fused shared experts."""
    local, ep, fused = draw(st.integers(1, 48)), draw(st.sampled_from((1, 2, 4))), draw(st.integers(0, 2))
    taken = draw(st.integers(1, min(local * ep, 8)))
    return MoEShape(local + fused, 64, 64, taken + fused, ep=ep, fused_shared=fused)


made = st.builds(
    lambda source, shape, tokens, seed: (shape, routing.routings(source, shape, tokens, 2, seed, "cpu")[1]),
    st.sampled_from(list(SOURCES.values())),
    shapes(),
    st.integers(1, 40),
    st.integers(0, 2**40),
)


def share_of_the_most_popular(routing_: Routing) -> float:
    """The part of all rows that the most popular of eight experts gets."""
    counts = routing_.topk_ids.flatten().bincount(minlength=SHAPE.experts).sort(descending=True).values
    return float(counts[: SHAPE.experts // 8].sum() / counts.sum())


def same(one: Routing, other: Routing) -> bool:
    return torch.equal(one.topk_ids, other.topk_ids) and torch.equal(one.topk_weights, other.topk_weights)


@given(made)
def test_no_token_takes_an_expert_of_this_rank_twice(of: tuple[MoEShape, Routing]) -> None:
    _, made_routing = of
    here = [[i for i in row if i != REMOTE] for row in made_routing.topk_ids.tolist()]
    assert all(len(row) == len(set(row)) for row in here)


@given(made)
def test_ids_are_of_this_rank_or_remote_and_remote_only_where_there_are_other_ranks(
    of: tuple[MoEShape, Routing],
) -> None:
    shape, made_routing = of
    ids = made_routing.topk_ids
    assert ids.min() >= (REMOTE if shape.ep > 1 else 0) and ids.max() < shape.experts


@given(made)
def test_each_token_takes_every_fused_shared_expert_after_the_routed_ones(of: tuple[MoEShape, Routing]) -> None:
    shape, made_routing = of
    taken = shape.top_k - shape.fused_shared
    routed, shared = made_routing.topk_ids[:, :taken], made_routing.topk_ids[:, taken:]
    local = shape.experts - shape.fused_shared
    assert routed.max() < local and (shared == torch.arange(local, shape.experts)).all()


@given(made)
def test_the_weights_of_each_token_add_up_to_one(of: tuple[MoEShape, Routing]) -> None:
    _, made_routing = of
    sums = made_routing.topk_weights.sum(dim=1)
    assert torch.allclose(sums, torch.ones_like(sums)) and (made_routing.topk_weights > 0).all()


@given(made)
def test_ids_are_int32_and_weights_float32_of_one_size_as_the_kernel_takes_them(of: tuple[MoEShape, Routing]) -> None:
    shape, made_routing = of
    ids, weights = made_routing.topk_ids, made_routing.topk_weights
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    assert ids.shape == weights.shape and ids.shape[1] == shape.top_k and ids.is_contiguous()


@pytest.mark.parametrize("seed", range(4))
def test_zipf_is_more_skewed_than_uniform(seed: int) -> None:
    uniform = share_of_the_most_popular(routing.uniform(SHAPE, 4096, seed, "cpu"))
    assert share_of_the_most_popular(routing.zipf(SHAPE, 4096, seed, "cpu")) > 2 * uniform


def test_zipf_is_the_more_skewed_the_larger_its_exponent_is() -> None:
    shares = [
        share_of_the_most_popular(routing.zipf(SHAPE, 4096, 0, "cpu", exponent)) for exponent in (0.0, 0.5, 1.0, 2.0)
    ]
    assert shares == sorted(shares) and len(set(shares)) == len(shares)


def test_zipf_with_one_expert_a_token_draws_by_rank_to_the_minus_one() -> None:
    shape = replace(SHAPE, experts=4, top_k=1)
    counts = routing.zipf(shape, 100_000, 0, "cpu").topk_ids.flatten().bincount(minlength=4)
    found = counts.sort(descending=True).values / 100_000
    expected = torch.tensor([12, 6, 4, 3]) / 25  # 1, 1/2, 1/3, 1/4 over their sum
    assert torch.allclose(found, expected, atol=0.01)


def test_which_expert_is_popular_changes_with_the_seed() -> None:
    most_popular = {
        int(routing.zipf(SHAPE, 1024, seed, "cpu").topk_ids.flatten().bincount().argmax()) for seed in (range(8))
    }
    assert len(most_popular) > 4


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_the_same_seed_makes_the_same_routings(source: RoutingSource) -> None:
    one, other = (routing.routings(source, SHAPE, 16, 4, 7, "cpu") for _ in range(2))
    assert all(map(same, one, other))


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_no_two_turns_and_no_two_seeds_share_a_routing(source: RoutingSource) -> None:
    made_routings = [one for seed in (0, 1) for one in routing.routings(source, SHAPE, 16, 4, seed, "cpu")]
    assert len({str(one.topk_ids.tolist()) for one in made_routings}) == 8


def test_mixed_takes_turns_between_uniform_and_zipf() -> None:
    mixed, uniform, zipf = (routing.routings(source, SHAPE, 16, 4, 3, "cpu") for source in (MIXED, UNIFORM, ZIPF))
    assert all(map(same, mixed, (uniform[0], zipf[1], uniform[2], zipf[3])))


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_a_source_goes_to_another_process_and_is_the_same_there(source: RoutingSource) -> None:
    assert pickle.loads(pickle.dumps(source)) == source


def test_mixed_is_the_first_that_is_offered() -> None:
    assert routing.NAMES == ("mixed", "uniform", "zipf")
