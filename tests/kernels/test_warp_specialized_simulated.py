"""The warp-specialized kernels in the simulator: right against float32, and each planted fault is caught."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the simulator takes the kernels' sources, not Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton.experimental.gluon")

import gluon_simulator
from warp_specialized_problems import down_error, interleaved, routed, sorted_pairs, up_error

from sglang_moe_ext.kernel_plans import WarpSpecializedDown, WarpSpecializedUp

UP, WIDE = WarpSpecializedUp(group_m=2), WarpSpecializedDown("wide", group_m=2)
PAIR = WarpSpecializedDown("pair", group_m=2, stages=3)
TOLERANCE = {"bf16": 6e-3, "fp16": 2e-3, "channel": 6e-3, "block": 6e-3}
QUANTIZED_TOLERANCE = 5e-2
"""Results in float8: half a step of 1 / 16, relative to the largest of 128."""
K = {"bf16": 192, "fp16": 320, "channel": 384, "block": 640}
"""Steps of 64, or of 128 in float8: more and fewer than there are stages."""
DOWN = [("bf16", WIDE), ("fp16", WIDE), ("channel", WIDE), ("block", WIDE), ("block", PAIR)]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(7)
    yield
    torch.set_num_threads(before)


def rows_of(route: str, tokens: int) -> Any:
    rows = sorted_pairs(routed("spread" if route == "interleaved" else route, tokens, 4, 2), 4)
    return interleaved(rows) if route == "interleaved" else rows


@pytest.mark.parametrize("route", ["spread", "one", "elsewhere", "interleaved"])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "channel", "block"])
def test_up_is_right_for_every_routing(kind: str, route: str) -> None:
    error = up_error(kind, rows_of(route, 150), tokens=150, inner=256, k=K[kind], config=UP)
    assert error < (QUANTIZED_TOLERANCE if kind == "block" else TOLERANCE[kind])


@pytest.mark.parametrize("route", ["spread", "one", "elsewhere", "interleaved"])
@pytest.mark.parametrize(("kind", "config"), DOWN, ids=str)
def test_down_is_right_for_every_routing(kind: str, config: WarpSpecializedDown, route: str) -> None:
    rows = rows_of(route, 150)
    error = down_error(kind, rows, columns=304, k=K[kind], config=config)
    assert error < TOLERANCE[kind]


@pytest.mark.parametrize("tokens", [1, 17, 64, 257])
@pytest.mark.parametrize("kind", ["bf16", "block"])
def test_any_number_of_tokens_will_do(kind: str, tokens: int) -> None:
    rows = rows_of("spread", tokens)
    up = up_error(kind, rows, tokens=tokens, inner=128, k=256, config=UP)
    assert up < (QUANTIZED_TOLERANCE if kind == "block" else TOLERANCE[kind])
    for config in (WIDE, PAIR) if kind == "block" else (WIDE,):
        assert down_error(kind, rows, columns=128, k=256, config=config) < TOLERANCE[kind]


@pytest.mark.parametrize("seed", range(4))
def test_no_order_of_events_changes_a_result(seed: int) -> None:
    rows = rows_of("spread", 150)
    assert up_error("block", rows, tokens=150, inner=256, k=640, config=UP, seed=seed) < QUANTIZED_TOLERANCE
    assert down_error("bf16", rows, columns=304, k=192, config=WIDE, seed=seed) < TOLERANCE["bf16"]


def test_no_tile_at_all_reads_nothing() -> None:
    rows = rows_of("one", 3)
    nothing = type(rows)(rows.ids, torch.full_like(rows.experts, 10**6), torch.zeros_like(rows.padded), rows.pairs)
    assert up_error("block", nothing, tokens=3, inner=128, k=256, config=UP) == 0
    assert down_error("block", nothing, columns=128, k=256, config=PAIR) == 0


def replaced(old: str, new: str, count: int = -1) -> Callable[[str], str]:
    return lambda source: source.replace(old, new, count)


EARLY = "mbarrier.arrive(empty.index((n + k - 1) % STAGES))"
FAULTS = {
    "a stage is given back while its product reads it": (
        "up", "bf16", "up_consumer", replaced(EARLY, "mbarrier.arrive(empty.index((n + k) % STAGES))"),
    ),
    "the last stage of a tile is not given back": (
        "down", "bf16", "down_consumer",
        replaced("mbarrier.arrive(empty.index((n + k_steps - 1) % STAGES))", "pass"),
    ),
    "a consumer does not wait for its stage": (
        "down", "block", "down_block_consumer",
        replaced("mbarrier.wait(full.index(slot), (n + k) // STAGES & 1)", "pass"),
    ),
    "the parity of a full stage is wrong": (
        "up", "block", "up_block_consumer",
        replaced("(n + k) // STAGES & 1)", "((n + k) // STAGES & 1) ^ 1)"),
    ),
    "the producer does not wait for an empty stage": (
        "down", "bf16", "tma_producer",
        replaced("mbarrier.wait(empty.index(slot)", "(lambda *_: None)(empty.index(slot)"),
    ),
    "a product is promoted before it was awaited": (
        "up", "block", "up_block_consumer",
        replaced("part = hopper.warpgroup_mma_wait(0, deps=(part, a, w_up))[0]", "pass"),
    ),
    "a stage is said to be full before its rows have landed": (
        "up", "bf16", "gather_producer", replaced("async_copy.wait_group(DELAY)", "pass"),
    ),
    "the rows of the last steps are not awaited": (
        "up", "bf16", "gather_producer", replaced("    async_copy.wait_group(0)\n", ""),
    ),
    "the producer expects too few bytes": (
        "up", "block", "gather_producer",
        replaced("2 * w_desc.block_type.nbytes", "w_desc.block_type.nbytes"),
    ),
    "a buffer is written while its store reads it": (
        "down", "bf16", "store_piece", replaced("tma.store_wait(1)", "tma.store_wait(2)"),
    ),
    "a drained tile gives back one stage too few": (
        "up", "bf16", "drain", replaced("range(steps)", "range(steps - 1)"),
    ),
    "a counter of steps is not advanced": (
        "up", "block", "up_block_consumer", replaced("        n += steps\n", "        n += 0\n"),
    ),
    "the scale of the step after is used": (
        "down", "block", "down_block_consumer",
        replaced("left + part * (a_scale * left_scale)", "left + part * (a_scale_after * left_scale)"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str) -> None:
    stage, kind, function, rewrite = FAULTS[name]
    kernels = gluon_simulator.simulated({function: rewrite})
    rows = rows_of("spread", 270)  # 180 rows an expert: a whole tile and a tail
    given = {"kernels": kernels, "timeout_s": 0.5}
    errors = []
    try:
        for seed in range(4):  # a race may spare one order of events
            if stage == "up":
                errors.append(up_error(kind, rows, tokens=270, inner=256, k=896, config=UP, seed=seed, **given))
            else:
                errors.append(down_error(kind, rows, columns=304, k=896, config=WIDE, seed=seed, **given))
    except gluon_simulator.SimulationError:
        return
    assert any(not error < QUANTIZED_TOLERANCE for error in errors)
