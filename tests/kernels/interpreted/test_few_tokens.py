"""The two launches for few tokens against float32, in Triton's interpreter; all that they write is poisoned before."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sglang_moe_ext.core import MoEExtError, Quantization
from sglang_moe_ext.few_tokens_config import DownTile, FewTokensConfig, UpTile
from sglang_moe_ext.kernels.few_tokens import (
    ExpertWeights,
    Routed,
    Workspace,
    few_tokens_down,
    few_tokens_layer,
    few_tokens_up,
    workspace,
)
from sglang_moe_ext.kernels.quantize import Scales, quantize_weights, real_weights
from sglang_moe_ext.kernels.reference import relative_error

NAN = float("nan")
SCHEMES = {
    "bf16": (torch.bfloat16, Quantization()),
    "fp16": (torch.float16, Quantization()),
    "fp8-block": (torch.bfloat16, Quantization("fp8_w8a8", (32, 32))),
    "fp8-channel": (torch.bfloat16, Quantization("fp8_w8a8", per_channel=True)),
    "fp8-tensor": (torch.bfloat16, Quantization("fp8_w8a8")),
    "int8-group": (torch.bfloat16, Quantization("int8_w8a16", (0, 32))),
    "int8-channel": (torch.bfloat16, Quantization("int8_w8a16", per_channel=True)),
    "int4-group": (torch.float16, Quantization("int4_w4a16", (0, 32))),
}
VECTOR = FewTokensConfig(UpTile(1, 8, 32, 1, 2), DownTile(1, 8, 32, 1, 2))
MATRIX = FewTokensConfig(UpTile(8, 16, 32, 1, 2), DownTile(16, 16, 32, 1, 2))
GROUPED = FewTokensConfig(UpTile(16, 16, 32, 1, 2), DownTile(16, 16, 32, 1, 2), grouped=True)
SPLIT = FewTokensConfig(UpTile(16, 16, 32, 1, 2), DownTile(16, 16, 32, 1, 2, split=3), grouped=True)
SPLIT_TOKENS = FewTokensConfig(UpTile(1, 8, 32, 1, 2), DownTile(1, 8, 32, 1, 2, split=2))
PATHS = {"vector": VECTOR, "matrix": MATRIX, "grouped": GROUPED, "grouped-split": SPLIT, "split": SPLIT_TOKENS}
BOUND = 4e-3


@dataclass(frozen=True)
class Case:
    hidden: Tensor
    w1: ExpertWeights
    w2: ExpertWeights
    routed: Routed


def case(
    scheme: str,
    tokens: int,
    top_k: int,
    *,
    experts: int = 6,
    hidden: int = 64,
    inner: int = 64,
    elsewhere: bool = False,
) -> Case:
    torch.manual_seed(tokens * 100 + top_k)
    dtype, quantization = SCHEMES[scheme]
    # Experts of different size: one taken for another shows.
    size = torch.arange(1, experts + 1).view(-1, 1, 1) / experts
    weights = [
        (torch.randn(experts, rows, k) / k**0.5 * size).to(dtype) for rows, k in ((2 * inner, hidden), (hidden, inner))
    ]
    if quantization.scheme is None:
        w1, w2 = (ExpertWeights(values) for values in weights)
    else:
        w1, w2 = (ExpertWeights(*quantize_weights(values, quantization), quantization) for values in weights)
    ids = torch.rand(tokens, experts).topk(top_k, dim=1).indices.int()
    if elsewhere:
        ids[torch.rand(ids.shape) < 0.4] = -1
    return Case(torch.randn(tokens, hidden).to(dtype), w1, w2, Routed(ids, torch.rand(tokens, top_k)))


def poisoned(given: Case, config: FewTokensConfig) -> Workspace:
    between = workspace(given.hidden, given.w1.values, given.routed.ids, config)
    between.act.fill_(NAN)
    for counted in (between.plan, between.arrived):
        if counted is not None:
            counted.fill_(-77)
    if between.parts is not None:
        between.parts.fill_(NAN)
    return between


def result(given: Case, config: FewTokensConfig, *, factor: float = 1.0, weighs_input: bool = False) -> Tensor:
    between, out = poisoned(given, config), torch.full_like(given.hidden, NAN)
    few_tokens_up(given.hidden, given.w1, given.routed, between, config, weighs_input=weighs_input)
    few_tokens_down(between, given.w2, given.routed, out, config, routed_scaling_factor=factor)
    return out


def expected(given: Case, *, factor: float = 1.0, weighs_input: bool = False) -> Tensor:
    """float32, activations never rounded."""
    out = torch.zeros(given.hidden.shape)
    scales = [None if w.scale is None else Scales(w.quantization, None, w.scale) for w in (given.w1, given.w2)]
    for token, ids in enumerate(given.routed.ids.tolist()):
        for slot, expert in enumerate(ids):
            if expert < 0:
                continue
            weight = given.routed.weights[token, slot]
            both = real_weights(given.w1.values, expert, scales[0]) @ given.hidden[token].float()
            gate, up = (both * weight if weighs_input else both).chunk(2)
            row = real_weights(given.w2.values, expert, scales[1]) @ (torch.nn.functional.silu(gate) * up)
            out[token] += row if weighs_input else row * weight
    return out * factor


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_right_where_tokens_share_experts_and_some_are_elsewhere(scheme: str, path: str) -> None:
    given = case(scheme, 5, 3, elsewhere=True)
    assert relative_error(result(given, PATHS[path], factor=2.5), expected(given, factor=2.5)) < BOUND


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("top_k", [2, 5, 10])
@pytest.mark.parametrize("tokens", [1, 16])
def test_every_number_of_experts_a_token_is_right(tokens: int, top_k: int, path: str) -> None:
    given = case("bf16", tokens, top_k, experts=12, hidden=32, inner=32)
    assert relative_error(result(given, PATHS[path]), expected(given)) < BOUND


@pytest.mark.parametrize("path", ["vector", "matrix", "grouped"])
def test_one_expert_a_token_is_right(path: str) -> None:
    given = case("bf16", 3, 1)
    assert relative_error(result(given, PATHS[path]), expected(given)) < BOUND


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("scheme", "hidden", "inner"), [("bf16", 72, 40), ("fp16", 33, 17), ("fp8-channel", 80, 24)])
def test_sizes_that_are_no_multiples_of_a_tile_are_right(scheme: str, hidden: int, inner: int, path: str) -> None:
    given = case(scheme, 3, 2, hidden=hidden, inner=inner)
    assert relative_error(result(given, PATHS[path]), expected(given)) < BOUND


@pytest.mark.parametrize("experts", [4, 40], ids=["by-expert", "by-first-pair"])
@pytest.mark.parametrize("tokens", [17, 32])
def test_more_tokens_are_grouped_in_a_wider_tile(tokens: int, experts: int) -> None:
    config = FewTokensConfig(UpTile(32, 8, 32, 4, 2), DownTile(32, 16, 32, 4, 2, split=2), grouped=True)
    given = case("bf16", tokens, 1, experts=experts, hidden=32, inner=32, elsewhere=True)
    assert relative_error(result(given, config), expected(given)) < BOUND


@pytest.mark.parametrize("path", PATHS)
def test_a_token_without_an_expert_here_is_zero(path: str) -> None:
    given = case("bf16", 3, 2)
    given.routed.ids.fill_(-1)
    assert torch.equal(result(given, PATHS[path]), torch.zeros_like(given.hidden))


@pytest.mark.parametrize("path", PATHS)
def test_the_routers_weight_may_weigh_the_experts_input(path: str) -> None:
    given = case("bf16", 4, 2)
    assert relative_error(result(given, PATHS[path], weighs_input=True), expected(given, weighs_input=True)) < BOUND


def test_an_expert_named_twice_by_a_token_counts_twice_when_grouped() -> None:
    given = case("bf16", 3, 2)
    given.routed.ids[1] = 4
    assert relative_error(result(given, GROUPED), expected(given)) < BOUND


def test_ids_may_have_64_bits() -> None:
    given = case("bf16", 3, 2, elsewhere=True)
    wide = Case(given.hidden, given.w1, given.w2, Routed(given.routed.ids.long(), given.routed.weights))
    assert torch.equal(result(wide, VECTOR), result(given, VECTOR))


def test_the_layer_writes_over_its_own_input() -> None:
    given = case("bf16", 4, 2)
    want = result(given, GROUPED)
    few_tokens_layer(given.hidden, given.w1, given.w2, given.routed, given.hidden, GROUPED)
    assert torch.equal(given.hidden, want)


def test_tensors_that_do_not_go_together_are_refused() -> None:
    given = case("bf16", 4, 2)
    fewer = Routed(given.routed.ids[:3], given.routed.weights[:3])
    with pytest.raises(MoEExtError, match="expected \\[tokens, hidden\\]"):
        few_tokens_layer(given.hidden, given.w1, given.w2, fewer, given.hidden, VECTOR)


def test_a_refused_configuration_is_never_launched() -> None:
    given = case("bf16", 17, 2)
    with pytest.raises(MoEExtError, match="as many as there are tokens"):
        few_tokens_layer(given.hidden, given.w1, given.w2, given.routed, given.hidden, GROUPED)
