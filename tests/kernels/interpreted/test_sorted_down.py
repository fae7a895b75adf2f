"""The kernels over rows sorted by expert against plain torch; outputs and rows of padding are poisoned with NaN.

The interpreter of Triton 3.7.1 loads and stores through host descriptors, so what runs here is what a GPU runs.
"""

import pytest
import torch
from moe_problems import QUANTIZATIONS, Problem, problem

from sglang_moe_ext.core import MoEExtError, Quantization
from sglang_moe_ext.kernel_plans import DownConfig, ShortKDownConfig
from sglang_moe_ext.kernels import reference, tma
from sglang_moe_ext.kernels.gather_sum import launch_gather_sum, launch_inverse
from sglang_moe_ext.kernels.quantize import Scales
from sglang_moe_ext.kernels.reference import Alignment, grouped_gemm, moe_align, relative_error
from sglang_moe_ext.kernels.sorted_down import launch_down
from sglang_moe_ext.kernels.sorted_down_short_k import launch_short_down

NAN = float("nan")
KINDS = ["bf16", "fp16", "fp8-block", "fp8-channel", "fp8-tensor"]
SMALL = DownConfig(block_m=16, block_n=16, block_k=32, group_m=1, num_warps=4, num_stages=2)
TALL = DownConfig(64, 16, 16, 8, 4, 2, programs_per_sm=3)
CONFIG_OF_TOKENS = {1: SMALL, 17: SMALL, 64: TALL, 257: TALL}
# Rows are rounded, and their sum again: 1.8e-3 and 2e-4 of the norm each time (in the interpreter, 2026-11-21).
BOUND = {torch.bfloat16: 3.2e-3, torch.float16: 5e-4}


def sorted_scales(case: Problem, alignment: Alignment) -> Scales | None:
    if case.scales is None or case.scales.activations is None or case.scales.activations.ndim == 1:
        return case.scales
    in_order = reference.in_sorted_order(case.scales.activations, alignment, NAN)
    return Scales(case.scales.quantization, in_order, case.scales.weights)


def down(
    case: Problem, alignment: Alignment, config: DownConfig | ShortKDownConfig, align: int, dtype: torch.dtype
) -> torch.Tensor:
    a = reference.in_sorted_order(case.a, alignment, NAN)
    out = torch.full((a.shape[0], case.weights.shape[1]), NAN, dtype=dtype)
    operands = (a, case.weights, out, alignment.expert_ids, alignment.num_tokens_post_padded)
    scales = sorted_scales(case, alignment)
    match config:
        case ShortKDownConfig():
            launch_short_down(*operands, config, align_block_m=align, scales=scales)
        case DownConfig():
            elsewhere = bool((case.topk_ids < 0).any())
            launch_down(*operands, config, align_block_m=align, scales=scales, experts_elsewhere=elsewhere)
    return out


def positions_of(case: Problem, alignment: Alignment, align: int) -> torch.Tensor:
    positions = torch.full(case.topk_ids.shape, 123456, dtype=torch.int32)
    elsewhere = bool((case.topk_ids < 0).any())
    launch_inverse(*alignment, positions, align_block_m=align, experts_elsewhere=elsewhere)
    return positions


def down_and_sum(
    case: Problem, config: DownConfig | ShortKDownConfig, dtype: torch.dtype, align: int = 0, factor: float = 1.0
) -> torch.Tensor:
    align = align or config.block_m
    alignment = moe_align(case.topk_ids, align, case.weights.shape[0])
    rows = down(case, alignment, config, align, dtype)
    out = torch.full((case.topk_ids.shape[0], case.weights.shape[1]), NAN, dtype=dtype)
    positions = positions_of(case, alignment, align)
    launch_gather_sum(rows, positions, case.topk_weights, out, routed_scaling_factor=factor)
    return out


def expected(case: Problem, factor: float = 1.0) -> torch.Tensor:
    rows = grouped_gemm(
        case.a, case.weights, case.topk_ids, top_k=1, scales=case.scales, routed_weights=case.topk_weights
    )
    return rows.view(*case.topk_ids.shape, -1).sum(dim=1) * factor


def check(kind: str, case: Problem, config: DownConfig | ShortKDownConfig, align: int = 0) -> None:
    dtype, _ = QUANTIZATIONS[kind]
    assert relative_error(down_and_sum(case, config, dtype, align), expected(case)) < BOUND[dtype]


@pytest.fixture
def crew_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tma, "multiprocessors", lambda device: 3)


@pytest.mark.parametrize("persistent", [True, False], ids=["crew", "one-tile"])
@pytest.mark.parametrize("tokens", CONFIG_OF_TOKENS)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_are_not_round_are_right(kind: str, tokens: int, persistent: bool, crew_of_three: None) -> None:
    tall = CONFIG_OF_TOKENS[tokens]
    config = DownConfig(tall.block_m, 16, tall.block_k, tall.group_m, 4, 2, persistent, tall.programs_per_sm)
    check(kind, problem(kind, tokens, 40, 80, down=True), config)


@pytest.mark.parametrize("persistent", [True, False], ids=["crew", "one-tile"])
@pytest.mark.parametrize("route", ["one", "elsewhere", "nobody"])
@pytest.mark.parametrize("kind", ["bf16", "fp8-block", "fp8-channel"])
def test_every_routing_is_right(kind: str, route: str, persistent: bool, crew_of_three: None) -> None:
    config = DownConfig(16, 16, 32, 2, 4, 2, persistent)
    check(kind, problem(kind, 33, 40, 64, down=True, route=route), config)


@pytest.mark.parametrize("slots", [1, 5, 8, 9])
def test_every_top_k_is_right(slots: int) -> None:
    check("bf16", problem("bf16", 17, 40, 64, down=True, experts=12, slots=slots), SMALL)


@pytest.mark.parametrize("kind", ["bf16", "fp8-block", "fp8-channel"])
@pytest.mark.parametrize("route", ["spread", "elsewhere"])
def test_a_tile_may_be_a_part_of_the_block_that_was_aligned(kind: str, route: str) -> None:
    check(kind, problem(kind, 33, 40, 64, down=True, route=route), SMALL, align=64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tile_stored_by_halves_is_right(kind: str) -> None:
    check(kind, problem(kind, 17, 40, 64, down=True), DownConfig(16, 16, 32, 1, 4, 2, half_stores=True))


@pytest.mark.parametrize("columns", [32, 40, 48, 64])
def test_a_tile_over_two_scale_groups_is_right(columns: int) -> None:
    check("fp8-block", problem("fp8-block", 33, columns, 80, down=True), DownConfig(16, 32, 32, 1, 4, 2))


def test_a_k_tile_inside_a_scale_group_is_right() -> None:
    check("fp8-block", problem("fp8-block", 17, 40, 80, down=True), DownConfig(16, 16, 16, 1, 4, 2))


@pytest.mark.parametrize("kind", ["bf16", "fp8-block", "fp8-channel"])
def test_experts_of_other_ranks_in_the_middle_cost_nothing_but_time(kind: str, crew_of_three: None) -> None:
    case = problem(kind, 65, 40, 64, down=True)
    alignment = moe_align(case.topk_ids, 16, 4)
    alignment.expert_ids[alignment.expert_ids == 2] = -1
    case.topk_ids[case.topk_ids == 2] = -1
    rows = down(case, alignment, SMALL, 16, torch.bfloat16)
    out = torch.full((65, 40), NAN, dtype=torch.bfloat16)
    launch_gather_sum(rows, positions_of(case, alignment, 16), case.topk_weights, out)
    assert relative_error(out, expected(case)) < BOUND[torch.bfloat16]


def test_rows_after_the_last_block_are_left_alone() -> None:
    case = problem("bf16", 33, 40, 64, down=True)
    alignment = moe_align(case.topk_ids, 16, 4)
    rows = down(case, alignment, SMALL, 16, torch.bfloat16)
    assert rows[int(alignment.num_tokens_post_padded) :].isnan().all()


@pytest.mark.parametrize("tiles", [1, 2, 8])
@pytest.mark.parametrize("tokens", [1, 17, 64, 257])
@pytest.mark.parametrize("kind", KINDS)
def test_a_short_k_that_stays_is_right(kind: str, tokens: int, tiles: int) -> None:
    check(kind, problem(kind, tokens, 40, 80, down=True), ShortKDownConfig(16, 16, 32, tiles, 4, 2))


@pytest.mark.parametrize("align", [16, 64])
@pytest.mark.parametrize("route", ["one", "elsewhere", "nobody"])
@pytest.mark.parametrize("kind", ["bf16", "fp8-block", "fp8-channel"])
def test_a_short_k_is_right_with_every_routing(kind: str, route: str, align: int) -> None:
    config = ShortKDownConfig(16, 16, 16, 2, 4, 2)
    check(kind, problem(kind, 33, 40, 64, down=True, route=route), config, align)


def test_a_k_that_is_not_short_is_refused() -> None:
    with pytest.raises(MoEExtError, match="K=520"):
        check("bf16", problem("bf16", 1, 16, 520, down=True), ShortKDownConfig(16, 16, 16, 2, 4, 2))


@pytest.mark.parametrize("group_m", [1, 2, 8, 64])
def test_neither_order_nor_crew_changes_a_bit(group_m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tma, "multiprocessors", lambda device: group_m + 1)
    case = problem("bf16", 64, 40, 64, down=True)
    config = DownConfig(16, 16, 32, group_m, 4, 2)
    alone = DownConfig(16, 16, 32, 1, 4, 2, persistent=False)
    assert torch.equal(down_and_sum(case, config, torch.bfloat16), down_and_sum(case, alone, torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_of_sorted_rows_agrees_with_that_of_pairs(kind: str) -> None:
    case = problem(kind, 33, 40, 64, down=True, route="elsewhere")
    alignment = moe_align(case.topk_ids, 16, 4)
    a = reference.in_sorted_order(case.a, alignment)
    rows = reference.down(a, case.weights, alignment, 16, sorted_scales(case, alignment))
    positions = reference.pair_positions(alignment, 16, *case.topk_ids.shape)
    torch.testing.assert_close(reference.gather_sum(rows, positions, case.topk_weights), expected(case))


@pytest.mark.parametrize("route", ["spread", "one", "elsewhere", "nobody"])
@pytest.mark.parametrize("tokens", [1, 17, 257])
def test_the_inverse_names_the_row_of_every_pair(tokens: int, route: str) -> None:
    case = problem("bf16", tokens, 8, 8, down=True, route=route)
    alignment = moe_align(case.topk_ids, 16, 4)
    assert torch.equal(positions_of(case, alignment, 16), reference.pair_positions(alignment, 16, *case.topk_ids.shape))


def test_a_pair_that_the_alignment_leaves_out_has_no_position() -> None:
    alignment = Alignment(
        torch.tensor([0, 3, 4, 4], dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.tensor([4])
    )
    positions = torch.full((2, 2), 123456, dtype=torch.int32)
    launch_inverse(*alignment, positions, align_block_m=4, experts_elsewhere=True)
    assert positions.tolist() == [[0, -1], [-1, 1]]


@pytest.mark.parametrize(
    ("kind", "columns", "k", "config", "match"),
    [
        pytest.param("bf16", 40, 76, SMALL, "`a`", id="rows-of-a-are-not-whole"),
        pytest.param("bf16", 36, 80, SMALL, "`out`", id="rows-of-out-are-not-whole"),
        pytest.param("bf16", 40, 80, DownConfig(16, 512, 32, 1, 4, 2), "side", id="wider-than-tma"),
        pytest.param("bf16", 40, 80, DownConfig(32, 16, 32, 1, 4, 2), "block_m=32", id="over-two-experts"),
        pytest.param("fp8-block", 40, 80, DownConfig(16, 64, 32, 1, 4, 2), "block_n=64", id="four-groups"),
        pytest.param("fp8-block", 40, 80, DownConfig(16, 16, 64, 1, 4, 2), "block_k=64", id="two-k-groups"),
    ],
)
def test_what_does_not_go_together_is_refused(kind: str, columns: int, k: int, config: DownConfig, match: str) -> None:
    case = problem(kind, 17, columns, k, down=True)
    with pytest.raises(MoEExtError, match=match):
        down(case, moe_align(case.topk_ids, 16, 4), config, 16, torch.bfloat16)


def test_a_k_that_the_tile_does_not_divide_is_refused_on_blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tma, "capability", lambda device: (10, 0))
    with pytest.raises(MoEExtError, match="K=80"):
        down_and_sum(problem("bf16", 17, 40, 80, down=True), SMALL, torch.bfloat16)


def test_int8_is_refused() -> None:
    with pytest.raises(MoEExtError, match="int8_w8a8"):
        tma.scaling_of(Quantization("int8_w8a8", per_channel=True))
