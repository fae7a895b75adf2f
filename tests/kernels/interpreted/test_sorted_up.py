"""The fused up projection and the activation of sorted rows against plain torch; outputs are poisoned with NaN."""

import pytest
import torch
from moe_problems import Problem, problem

from sglang_moe_ext.core import MoEExtError, Quantization
from sglang_moe_ext.kernel_plans import UpConfig
from sglang_moe_ext.kernels import reference, tma
from sglang_moe_ext.kernels.quantize import Scales
from sglang_moe_ext.kernels.reference import Alignment, grouped_gemm, moe_align, relative_error
from sglang_moe_ext.kernels.sorted_up import launch_up
from sglang_moe_ext.kernels.swiglu import GROUP, LONGEST_ROW, launch_quantize, launch_swiglu, launch_swiglu_of_rows

NAN = float("nan")
COLUMNS = 128
"""Of the activations: one scale's."""
# Rounded to 16 bits once; to float8 in groups of 128.
BOUND_16_BITS, BOUND_FLOAT8 = 3.2e-3, 3e-2


def poisoned(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(size, NAN).to(dtype)


def expected(case: Problem) -> torch.Tensor:
    """[pairs, columns] float32."""
    rows = grouped_gemm(case.a, case.weights, case.topk_ids, top_k=case.topk_ids.shape[1], scales=case.scales)
    gate, up = rows.view(-1, rows.shape[-1]).float().chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def up(case: Problem, config: UpConfig, align: int, *, quantizes: bool) -> tuple[Alignment, torch.Tensor]:
    """The alignment, and rows [rows, columns] as float32."""
    alignment = moe_align(case.topk_ids, align, case.weights.shape[0])
    rows, columns = alignment.sorted_token_ids.numel(), case.weights.shape[1] // 2
    out = poisoned(rows, columns, dtype=torch.float8_e4m3fn if quantizes else torch.bfloat16)
    scale = poisoned(rows, columns // GROUP, dtype=torch.float32) if quantizes else None
    launch_up(
        case.a, case.weights, out, *alignment, config,
        pairs=case.topk_ids.numel(), top_k=case.topk_ids.shape[1], align_block_m=align,
        scales=case.scales, out_scale=scale,
    )  # fmt: skip
    if scale is None:
        return alignment, out.float()
    return alignment, (out.float().view(rows, -1, GROUP) * scale[:, :, None]).view(rows, columns)


def error(case: Problem, alignment: Alignment, rows: torch.Tensor) -> float:
    pairs = case.topk_ids.numel()
    ids = alignment.sorted_token_ids[: int(alignment.num_tokens_post_padded[0])].long()
    real = torch.nonzero(ids < pairs).flatten()
    return relative_error(rows[real], expected(case)[ids[real]])


@pytest.fixture(autouse=True)
def crew_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tma, "multiprocessors", lambda device: 3)


@pytest.mark.parametrize("persistent", [True, False], ids=["crew", "one-tile"])
@pytest.mark.parametrize("tokens", [1, 17, 64, 257])
@pytest.mark.parametrize("kind", ["bf16", "fp8-block"])
def test_the_activations_of_every_pair_are_right(kind: str, tokens: int, persistent: bool) -> None:
    case = problem(kind, tokens, 2 * COLUMNS, 64)
    config = UpConfig(16, 32 if kind == "bf16" else 16, 16, 2, 4, 2, persistent)
    assert error(case, *up(case, config, 16, quantizes=False)) < BOUND_16_BITS


@pytest.mark.parametrize("half_stores", [False, True], ids=["tiles", "halves"])
@pytest.mark.parametrize("kind", ["bf16", "fp8-block"])
def test_gate_and_up_are_right_as_they_lie(kind: str, half_stores: bool) -> None:
    case = problem(kind, 33, 2 * COLUMNS, 64)
    config = UpConfig(16, 16, 16, 2, 4, 2, is_fused=False, half_stores=half_stores)
    alignment = moe_align(case.topk_ids, 16, case.weights.shape[0])
    out = poisoned(alignment.sorted_token_ids.numel(), 2 * COLUMNS, dtype=torch.bfloat16)
    launch_up(
        case.a, case.weights, out, *alignment, config,
        pairs=case.topk_ids.numel(), top_k=2, align_block_m=16, scales=case.scales,
    )  # fmt: skip
    gate, up_half = out.float().chunk(2, dim=1)
    assert error(case, alignment, torch.nn.functional.silu(gate) * up_half) < BOUND_16_BITS


@pytest.mark.parametrize("align", [16, 32], ids=["whole", "half"])
def test_a_tile_may_be_a_part_of_the_block_that_was_aligned(align: int) -> None:
    case = problem("bf16", 33, 2 * COLUMNS, 64)
    assert error(case, *up(case, UpConfig(16, 64, 32, 1, 4, 2), align, quantizes=False)) < BOUND_16_BITS


def test_quantized_activations_are_what_their_scales_make_of_them() -> None:
    case = problem("bf16", 33, 2 * COLUMNS, 64)
    assert error(case, *up(case, UpConfig(16, GROUP, 32, 1, 4, 2), 16, quantizes=True)) < BOUND_FLOAT8


def test_a_quantized_tile_has_the_columns_of_one_scale() -> None:
    case = problem("bf16", 4, 2 * COLUMNS, 64)
    with pytest.raises(MoEExtError, match="columns of one scale"):
        up(case, UpConfig(16, 64, 32, 1, 4, 2), 16, quantizes=True)


def test_sizes_that_are_no_whole_tiles_are_refused() -> None:
    case = problem("bf16", 4, 2 * COLUMNS, 80)
    with pytest.raises(MoEExtError, match="whole tiles"):
        up(case, UpConfig(16, 64, 64, 1, 4, 2), 16, quantizes=False)


def test_scales_of_rows_are_refused() -> None:
    case = problem("fp8-channel", 4, 2 * COLUMNS, 64)
    with pytest.raises(MoEExtError, match="cannot do"):
        up(case, UpConfig(16, 64, 32, 1, 4, 2), 16, quantizes=False)


def gate_and_up(rows: int) -> torch.Tensor:
    return torch.randn(rows, 4 * GROUP, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def activated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up_half = gate_up.float().chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up_half


@pytest.mark.parametrize("used", [0, 1, 30, 37])
def test_rows_up_to_the_last_used_one_are_activated_and_no_others(used: int) -> None:
    gate_up, out = gate_and_up(37), poisoned(37, 2 * GROUP, dtype=torch.bfloat16)
    launch_swiglu(gate_up, torch.tensor([used], dtype=torch.int32), out)
    assert relative_error(out[:used], activated(gate_up)[:used]) < BOUND_16_BITS if used else True
    assert bool(out[used:].isnan().all())


def test_activated_rows_are_quantized_in_groups() -> None:
    gate_up, out = gate_and_up(37), poisoned(37, 2 * GROUP, dtype=torch.float8_e4m3fn)
    scales = poisoned(37, 2, dtype=torch.float32)
    launch_swiglu(gate_up, torch.tensor([37], dtype=torch.int32), out, scales=scales)
    real = (out.float().view(37, 2, GROUP) * scales[:, :, None]).view(37, -1)
    assert relative_error(real, activated(gate_up)) < BOUND_FLOAT8


@pytest.mark.parametrize("used", [0, 1, 30, 37])
def test_rows_are_quantized_whole_up_to_the_last_used_one(used: int) -> None:
    gate_up, out = gate_and_up(37), poisoned(37, 2 * GROUP, dtype=torch.float8_e4m3fn)
    scales = poisoned(37, 1, dtype=torch.float32)
    launch_swiglu_of_rows(gate_up, torch.tensor([used], dtype=torch.int32), out, scales)
    real = out.float() * scales
    assert relative_error(real[:used], activated(gate_up)[:used]) < BOUND_FLOAT8 if used else True
    assert bool(scales[used:].isnan().all())


@pytest.mark.parametrize("used", [0, 1, 30, 37])
def test_rows_that_are_activated_already_are_only_quantized(used: int) -> None:
    values, out = gate_and_up(37), poisoned(37, 4 * GROUP, dtype=torch.float8_e4m3fn)
    scales = poisoned(37, 1, dtype=torch.float32)
    launch_swiglu_of_rows(values, torch.tensor([used], dtype=torch.int32), out, scales)
    real = out.float() * scales
    assert relative_error(real[:used], values[:used].float()) < BOUND_FLOAT8 if used else True
    assert bool(scales[used:].isnan().all())


def test_all_rows_are_quantized_where_none_is_padding() -> None:
    values, out = gate_and_up(5), poisoned(5, 4 * GROUP, dtype=torch.float8_e4m3fn)
    scales = poisoned(5, 1, dtype=torch.float32)
    launch_swiglu_of_rows(values, None, out, scales)
    assert relative_error(out.float() * scales, values.float()) < BOUND_FLOAT8


def test_rows_too_long_for_one_program_are_refused() -> None:
    width = LONGEST_ROW + GROUP
    out, scales = poisoned(1, width, dtype=torch.float8_e4m3fn), poisoned(1, 1, dtype=torch.float32)
    with pytest.raises(MoEExtError, match="at most"):
        launch_swiglu_of_rows(torch.zeros(1, 2 * width), torch.tensor([1], dtype=torch.int32), out, scales)


def test_a_row_of_zeros_is_quantized_to_zeros() -> None:
    out, scales = poisoned(3, GROUP, dtype=torch.float8_e4m3fn), poisoned(3, 1, dtype=torch.float32)
    launch_quantize(torch.zeros(3, GROUP, dtype=torch.bfloat16), out, scales)
    assert bool((out.float() == 0).all())
    assert bool(scales.isfinite().all())


def test_values_alone_are_quantized() -> None:
    values = gate_and_up(5)
    out, scales = poisoned(5, 4 * GROUP, dtype=torch.float8_e4m3fn), poisoned(5, 4, dtype=torch.float32)
    launch_quantize(values, out, scales)
    real = Scales(Quantization("fp8_w8a8", (GROUP, GROUP)), scales, scales)
    rows = torch.arange(5)
    assert relative_error(reference.real_rows(out, rows, real), values.float()) < BOUND_FLOAT8
