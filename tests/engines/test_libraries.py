"""Other libraries' layers: those that run on a CPU against float32, and why the others are left out here."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext.core import MoEShape, Quantization
from sglang_moe_ext.engines.libraries.layer_library import why_not_usable
from sglang_moe_ext.engines.libraries.pairs_by_expert import sort_pairs
from sglang_moe_ext.engines.libraries.registry import LIBRARIES
from sglang_moe_ext.engines.registry import SGLANG
from sglang_moe_ext.tuning.bench.layer import BenchedLayer
from sglang_moe_ext.tuning.bench.nan_fill import NanFill
from sglang_moe_ext.tuning.bench.routing import MIXED

BLOCK, CHANNEL = Quantization("fp8_w8a8", (128, 128)), Quantization("fp8_w8a8", per_channel=True)


@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_each_pair_stands_among_those_of_its_expert(tokens: int, experts: int, slots: int, seed: int) -> None:
    ids = torch.randint(experts, (tokens, slots), generator=torch.Generator().manual_seed(seed))
    pairs = sort_pairs(ids, experts)
    begins = pairs.bounds[:-1]
    assert pairs.bounds[-1] == ids.numel()
    assert torch.all((begins[ids] <= pairs.rows) & (pairs.rows < pairs.ends[ids]))
    assert torch.equal(pairs.rows.flatten().sort().values, torch.arange(ids.numel()))
    assert torch.equal(pairs.tokens[pairs.rows], torch.arange(tokens)[:, None].expand(tokens, slots))


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_a_layer_by_torchs_grouped_product_is_right(tokens: int) -> None:
    shape = MoEShape(6, 32, 64, 3)
    layer = BenchedLayer(None, shape, MIXED, 0, adapter=SGLANG, device="cpu")
    batch = layer.batch(tokens, 1)
    run = LIBRARIES["torch"].prepare(shape, layer.whole(batch, 0))
    for turn in range(2):
        with NanFill():
            out = run(layer.whole(batch, turn))
        assert layer.error(batch, turn, out) < 1e-2


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize(
    ("shape", "why"),
    [(MoEShape(8, 128, 256, 2, ep=2), "experts of other ranks"), (MoEShape(8, 128, 256, 2, gated=False), "not SwiGLU")],
)
def test_what_none_of_them_is_asked_for_here_is_said(name: str, shape: MoEShape, why: str) -> None:
    assert why in (why_not_usable(LIBRARIES[name], shape) or "")


@pytest.mark.parametrize(
    ("name", "quantization"),
    [(name, it) for name in LIBRARIES for it in (BLOCK, CHANNEL) if (name, it) != ("deep_gemm", BLOCK)],
)
def test_weights_that_a_library_does_not_take_are_said_before_it_is_imported(
    name: str, quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, LIBRARIES[name].MODULE, None)
    assert str(quantization) in (why_not_usable(LIBRARIES[name], MoEShape(8, 128, 256, 2, quantization)) or "")


@pytest.mark.parametrize("name", sorted(LIBRARIES.keys() - {"torch"}))
def test_a_library_that_is_not_here_names_the_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, LIBRARIES[name].MODULE, None)
    why = why_not_usable(LIBRARIES[name], MoEShape(8, 128, 256, 2)) or ""
    assert "cannot be imported" in why
    assert LIBRARIES[name].PACKAGE in why


def test_deep_gemm_gets_blocks_of_one_experts_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for DeepGEMM, which has no kernel for a CPU: it multiplies as the names of its arguments say. Our
    kernels around it run in Triton's interpreter, so that this is a matter of `tests/kernels/interpreted`."""
    calls: list[tuple[Any, ...]] = []

    class StandIn:
        @staticmethod
        def m_grouped_bf16_gemm_nt_contiguous(a: Any, b: Any, d: Any, layout: Any) -> None:
            calls.append((tuple(a.shape), tuple(b.shape), tuple(d.shape), tuple(layout.shape)))

    monkeypatch.setitem(sys.modules, "deep_gemm", StandIn)  # type: ignore[arg-type]
    from sglang_moe_ext.engines.libraries.deep_gemm import _multiply

    _multiply(torch.zeros(256, 64), None, torch.zeros(4, 32, 64), None, torch.zeros(256, 32), torch.zeros(256))
    assert calls == [((256, 64), (4, 32, 64), (256, 32), (256,))]
