"""The warp-specialized kernels on a Hopper GPU against float32: odd sizes, other ranks' experts, no tokens, a graph."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
if torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)
pytest.importorskip("triton.experimental.gluon")

from warp_specialized_problems import down_error, interleaved, routed, sorted_pairs, up_error

from sglang_moe_ext.kernel_plans import WarpSpecializedDown, WarpSpecializedUp
from sglang_moe_ext.kernels import gather_sum, reference, sort_tokens
from sglang_moe_ext.kernels.warp_specialized_down import launch_down
from sglang_moe_ext.kernels.warp_specialized_up import launch_up

UPS = [WarpSpecializedUp(), WarpSpecializedUp(2, persistent=False)]
WIDE, PAIR = WarpSpecializedDown(), WarpSpecializedDown("pair", stages=3)
DOWN = [("bf16", WIDE), ("fp16", WIDE), ("channel", WIDE), ("block", WIDE), ("block", PAIR)]
TOLERANCE, QUANTIZED_TOLERANCE = 6e-3, 5e-2


@pytest.mark.parametrize("route", ["spread", "one", "elsewhere", "interleaved"])
@pytest.mark.parametrize("tokens", [1, 17, 64, 257, 1000])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "channel", "block"])
def test_both_projections_are_right(kind: str, tokens: int, route: str) -> None:
    torch.manual_seed(tokens)
    rows = sorted_pairs(routed("spread" if route == "interleaved" else route, tokens, 4, 2), 4)
    rows = interleaved(rows) if route == "interleaved" else rows
    for config in UPS:
        error = up_error(kind, rows, tokens=tokens, inner=256, k=640, config=config, kernels="gpu")
        assert error < (QUANTIZED_TOLERANCE if kind == "block" else TOLERANCE)
    for of_kind, config in DOWN:
        if of_kind == kind:
            assert down_error(kind, rows, columns=304, k=384, config=config, kernels="gpu") < TOLERANCE


@pytest.mark.parametrize("kind", ["bf16", "block"])
def test_no_tile_at_all_is_no_fault(kind: str) -> None:
    rows = sorted_pairs(routed("one", 3, 4, 2), 4)
    nothing = type(rows)(rows.ids, rows.experts, torch.zeros_like(rows.padded), rows.pairs)
    assert up_error(kind, nothing, tokens=3, inner=128, k=256, config=UPS[0], kernels="gpu") == 0
    assert down_error(kind, nothing, columns=128, k=256, config=WIDE, kernels="gpu") == 0
    torch.cuda.synchronize()


def test_a_graph_replays_it_on_other_data() -> None:
    rows = sorted_pairs(routed("spread", 300, 4, 2), 4)
    a = torch.randn(rows.ids.numel(), 256, device="cuda", dtype=torch.bfloat16)
    weights = torch.randn(4, 512, 256, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(rows.ids.numel(), 512, device="cuda", dtype=torch.bfloat16)
    ids, experts, padded = rows.ids.cuda(), rows.experts.cuda(), rows.padded.cuda()

    def run() -> None:
        launch_down(a, weights, out, experts, padded, WIDE, sorted_token_ids=ids, pairs=rows.pairs)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    a.copy_(torch.randn_like(a))
    run()
    wanted = out.clone()
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    real = rows.real.cuda()
    assert torch.equal(out[real], wanted[real])


@pytest.mark.parametrize("tokens", [1, 300, 5000])
def test_a_chain_of_launches_reads_what_the_kernels_before_it_wrote(tokens: int) -> None:
    """Both projections, the sort before and the sum after them, 20 times in buffers that are used again."""
    experts, top_k, hidden, inner = 16, 4, 512, 256
    torch.manual_seed(tokens)
    w1 = torch.randn(experts, 2 * inner, hidden, device="cuda", dtype=torch.bfloat16) / hidden**0.5
    w2 = torch.randn(experts, hidden, inner, device="cuda", dtype=torch.bfloat16) / inner**0.5

    def run(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        made = sort_tokens.launch_sort(ids, experts, 128)
        between = x.new_empty(made.ids.numel(), inner)
        launch_up(x, w1, between, made.ids, made.experts, made.padded, UPS[0], pairs=ids.numel(), top_k=top_k)
        rows, out = x.new_empty(made.ids.numel(), hidden), torch.empty_like(x)
        launch_down(
            between, w2, rows, made.experts, made.padded, WIDE, sorted_token_ids=made.ids, pairs=ids.numel()
        )  # fmt: skip
        assert made.positions is not None
        gather_sum.launch_gather_sum(rows, made.positions, weights, out)
        return out

    batches = []
    for _ in range(20):
        x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
        ids = torch.rand(tokens, experts, device="cuda").topk(top_k).indices.int()
        batches.append((x, ids, torch.rand(tokens, top_k, device="cuda")))
    at_once = [run(*batch) for batch in batches]
    torch.cuda.synchronize()
    for batch, out in zip(batches, at_once, strict=True):
        alone = run(*batch)
        torch.cuda.synchronize()
        assert torch.equal(out, alone)
        x, ids, weights = batch
        wanted = reference.moe_layer(x, w1, w2, weights, ids)
        assert reference.relative_error(out, wanted) < TOLERANCE
