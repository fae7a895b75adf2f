"""The layer that is measured: its weights in every scheme, its inputs, and what its result is held against."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext.core import PROJECTIONS, MoEShape, Quantization
from sglang_moe_ext.engines.registry import SGLANG
from sglang_moe_ext.kernels import reference
from sglang_moe_ext.kernels.quantize import Scales, quantize_weights, real_weights
from sglang_moe_ext.tuning.bench.layer import BenchedLayer, LayerBatch, checked_rows
from sglang_moe_ext.tuning.bench.routing import MIXED

ENGINE: Any = None
"""Weights and inputs need none."""
SCHEMES = {
    "fp8-block": (Quantization("fp8_w8a8", (16, 32)), 0.05),
    "fp8-channel": (Quantization("fp8_w8a8", per_channel=True), 0.05),
    "fp8-tensor": (Quantization("fp8_w8a8"), 0.05),
    "int8-block": (Quantization("int8_w8a8", (16, 32)), 0.015),
    "int8-channel": (Quantization("int8_w8a8", per_channel=True), 0.015),
    "int8-group": (Quantization("int8_w8a16", (0, 32)), 0.015),
    "int8-weights-per-channel": (Quantization("int8_w8a16", per_channel=True), 0.015),
    "int4-group": (Quantization("int4_w4a16", (0, 32)), 0.15),
}
"""By name, with a bound of the relative error of rounding normal values."""


def layer(quantization: Quantization | None = None, seed: int = 0, **more: Any) -> BenchedLayer:
    shape = MoEShape(5, 32, 64, 2, quantization or Quantization(), **more)
    return BenchedLayer(ENGINE, shape, MIXED, seed, adapter=SGLANG, device="cpu")


@pytest.mark.parametrize(("quantization", "bound"), SCHEMES.values(), ids=SCHEMES.keys())
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_quantized_weights_stand_for_those_of_the_same_seed(
    projection: Any, quantization: Quantization, bound: float
) -> None:
    plain, quantized = layer().weights[projection].stored, layer(quantization).weights[projection]
    assert quantized.scale is not None
    scales = Scales(quantization, None, quantized.scale)
    errors = [
        reference.relative_error(real_weights(quantized.stored, expert, scales), plain[expert]) for expert in range(5)
    ]
    assert all(1e-3 < error < bound for error in errors), errors


@pytest.mark.parametrize("quantization", [each for each, _ in SCHEMES.values()], ids=SCHEMES.keys())
def test_weights_lie_as_if_all_experts_were_quantized_at_once(quantization: Quantization) -> None:
    ours = layer(quantization).weights["up"]
    stored, scale = quantize_weights(layer().weights["up"].stored, quantization)
    assert ours.scale is not None
    assert ours.stored.dtype == stored.dtype
    assert torch.equal(ours.stored.view(torch.uint8), stored.view(torch.uint8))
    assert (ours.scale.dtype, torch.equal(ours.scale, scale)) == (scale.dtype, True)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_weights_that_are_not_quantized_have_no_scale_and_a_deviation_that_keeps_results_near_one(gated: bool) -> None:
    weights = layer(gated=gated).weights
    assert [(weights[each].scale, tuple(weights[each].stored.shape)) for each in PROJECTIONS] == [
        (None, (5, 64 if gated else 32, 64)),
        (None, (5, 64, 32)),
    ]
    assert float(weights["up"].stored.float().std()) == pytest.approx(64**-0.5, rel=0.05)


def test_no_two_experts_have_the_same_weights() -> None:
    stored = layer().weights["up"].stored
    assert not any(torch.equal(stored[0], stored[expert]) for expert in range(1, 5))


def test_a_seed_of_a_batch_decides_its_inputs_and_routings() -> None:
    one = layer()
    first, again, other = one.batch(7, 3), one.batch(7, 3), one.batch(7, 4)
    assert torch.equal(first.hidden, again.hidden)
    assert torch.equal(first.routings[0].topk_ids, again.routings[0].topk_ids)
    assert not torch.equal(first.hidden, other.hidden)


def test_inputs_are_not_the_weights_again() -> None:
    one = layer(seed=3)
    expert = one.weights["up"].stored[0, :7].float()
    assert not torch.allclose(one.batch(7, 3).hidden.float() / 8, expert, atol=0.05)


@given(st.integers(1, 20_000), st.integers(1, 4096))
def test_checked_rows_are_different_rows_in_order_with_the_first_and_the_last(tokens: int, most: int) -> None:
    rows = checked_rows(tokens, most).tolist()
    assert len(rows) == min(tokens, most)
    assert rows == sorted(set(rows))
    assert rows[0] == 0
    assert rows[-1] == tokens - 1 or most == 1


@given(st.integers(2, 20_000), st.integers(2, 4096))
def test_checked_rows_lie_at_even_distances(tokens: int, most: int) -> None:
    rows = checked_rows(tokens, most)
    distances = rows.diff().tolist()
    assert not distances or max(distances) - min(distances) <= 1


def true_result(one: BenchedLayer, batch: LayerBatch, turn: int = 0) -> torch.Tensor:
    tensors = one.whole(batch, turn)
    return reference.moe_layer(
        tensors.hidden,
        tensors.w1,
        tensors.w2,
        tensors.topk_weights,
        tensors.topk_ids,
        quantization=one.shape.quantization,
        w1_scale=tensors.w1_scale,
        w2_scale=tensors.w2_scale,
    ).to(torch.bfloat16)


TOKENS = 5000
"""More than are checked."""


@pytest.mark.parametrize("quantization", [None, *(each for each, _ in SCHEMES.values())], ids=["bf16", *SCHEMES])
def test_a_right_result_has_a_small_error(quantization: Quantization | None) -> None:
    one = layer(quantization)
    batch = one.batch(TOKENS, 1)
    assert one.error(batch, 1, true_result(one, batch, 1)) < 5e-3


@pytest.mark.parametrize("row", [0, TOKENS - 1], ids=["first", "last"])
def test_a_wrong_row_at_either_end_shows(row: int) -> None:
    one = layer()
    batch = one.batch(TOKENS, 1)
    out = true_result(one, batch)
    out[row] += 1000.0
    assert one.error(batch, 0, out) > 1


def test_wrong_rows_behind_the_first_few_thousand_show() -> None:
    one = layer()
    batch = one.batch(TOKENS, 1)
    out = true_result(one, batch)
    out[2048:] = 0.0
    assert one.error(batch, 0, out) > 0.5


def test_a_row_that_is_not_finite_shows_wherever_it_is() -> None:
    one = layer()
    batch = one.batch(TOKENS, 1)
    checked = set(checked_rows(TOKENS, 2048).tolist())
    out = true_result(one, batch)
    out[next(row for row in range(TOKENS) if row not in checked)] = float("nan")
    assert one.error(batch, 0, out) == float("inf")
