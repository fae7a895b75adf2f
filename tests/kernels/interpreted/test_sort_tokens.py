"""The sort of pairs by expert against plain torch, and the quantization beside it, on poisoned buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.kernel_plans import MOST_SORTED_EXPERTS
from sglang_moe_ext.kernels import reference, swiglu
from sglang_moe_ext.kernels.sort_tokens import QuantizedTokens, SortedTokens, launch_sort
from sglang_moe_ext.tuning.bench.nan_fill import NanFill

POISON = 7


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, empty integers hold a row that is there, and empty floats NaN."""
    original = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *size: object, **named: object) -> torch.Tensor:
        made: torch.Tensor = original(self, *size, **named)
        return made.fill_(POISON) if not made.dtype.is_floating_point else made

    torch.Tensor.new_empty = new_empty  # type: ignore[method-assign]
    try:
        with NanFill():
            yield
    finally:
        torch.Tensor.new_empty = original  # type: ignore[method-assign]


def routed(tokens: int, slots: int, experts: int, kind: str) -> torch.Tensor:
    torch.manual_seed(tokens * slots)
    match kind:
        case "one expert":
            return torch.full((tokens, slots), experts - 1, dtype=torch.int32)
        case "elsewhere":
            ids = torch.randint(-1, 2 * experts, (tokens, slots), dtype=torch.int32)
            return torch.where(ids < experts, ids, -1)
        case "beyond":
            return torch.randint(-3, 2 * experts, (tokens, slots), dtype=torch.int64)
        case _:
            return torch.randint(0, experts, (tokens, slots), dtype=torch.int64)


def check(made: SortedTokens, ids: torch.Tensor, experts: int, block_m: int) -> None:
    """Against a stable sort of what is here, whole."""
    pairs = ids.numel()
    flat = ids.flatten().long()
    is_here = (flat >= 0) & (flat < experts)
    rows, owners = [], []
    for expert in range(experts):
        of_expert = torch.nonzero(flat == expert).flatten().tolist()
        padding = -len(of_expert) % block_m
        rows += of_expert + [pairs] * padding
        owners += [expert] * ((len(of_expert) + padding) // block_m)
    assert made.positions is not None
    assert int(made.padded) == len(rows)
    assert made.ids[: len(rows)].tolist() == rows
    assert made.experts[: len(owners)].tolist() == owners
    assert made.ids.numel() >= len(rows)
    positions = made.positions.flatten()
    assert torch.equal(positions >= 0, is_here)
    assert torch.equal(made.ids[positions[is_here].long()].long(), torch.arange(pairs)[is_here])


@pytest.mark.parametrize(
    ("tokens", "slots", "experts", "block_m", "kind"),
    [
        (1, 1, 1, 16, "alike"),
        (3, 2, 8, 16, "elsewhere"),
        (33, 8, 60, 64, "beyond"),
        (33, 8, 60, 64, "one expert"),
        (5, 10, 513, 128, "alike"),
        (1100, 9, 16, 128, "elsewhere"),
        (700, 3, 257, 64, "one expert"),
    ],
)
def test_pairs_stand_in_the_order_of_their_experts_padded_to_blocks(
    tokens: int, slots: int, experts: int, block_m: int, kind: str
) -> None:
    ids = routed(tokens, slots, experts, kind)
    with poisoned():
        made = launch_sort(ids, experts, block_m)
    check(made, ids, experts, block_m)


def test_it_is_the_reference_of_the_engines_sort_where_all_experts_are_here() -> None:
    ids = routed(50, 4, 12, "alike").int()
    made, wanted = launch_sort(ids, 12, 32), reference.moe_align(ids, 32, 12)
    used = int(wanted.num_tokens_post_padded)
    assert int(made.padded) == used
    assert torch.equal(made.ids[:used], wanted.sorted_token_ids[:used])
    assert torch.equal(made.experts[: used // 32], wanted.expert_ids[: used // 32])


@pytest.mark.parametrize("hidden_size", [128, 384, 640])
@pytest.mark.parametrize("of_rows", [False, True])
def test_tokens_are_quantized_beside_it_as_by_themselves(hidden_size: int, of_rows: bool) -> None:
    tokens = 37
    hidden = torch.randn(tokens, hidden_size).bfloat16()
    hidden[3] = 0
    scales = 1 if of_rows else hidden_size // 128

    def empty() -> QuantizedTokens:
        return QuantizedTokens(
            torch.empty(tokens, hidden_size, dtype=torch.float8_e4m3fn), torch.full((tokens, scales), float("nan"))
        )

    beside, alone = empty(), empty()
    ids = routed(tokens, 4, 9, "alike")
    with poisoned():
        made = launch_sort(ids, 9, 64, hidden=hidden, quantized=beside)
    check(made, ids, 9, 64)
    if of_rows:
        swiglu.launch_swiglu_of_rows(hidden, None, alone.values, alone.scale)
    else:
        swiglu.launch_quantize(hidden, alone.values, alone.scale)
    assert torch.equal(beside.values.view(torch.uint8), alone.values.view(torch.uint8))
    assert torch.equal(beside.scale, alone.scale)


def test_no_tokens_are_no_blocks() -> None:
    assert int(launch_sort(torch.empty(0, 8, dtype=torch.int32), 4, 16).padded) == 0


def test_ids_that_are_not_contiguous_are_read_in_order() -> None:
    ids = routed(40, 6, 8, "alike")[:, ::2]
    check(launch_sort(ids, 8, 16), ids, 8, 16)


@pytest.mark.parametrize(
    ("ids", "experts"),
    [(torch.zeros(2, 2), 4), (torch.zeros(4, dtype=torch.int32), 4), (torch.zeros(2, 2, dtype=torch.int32), 0),
     (torch.zeros(2, 2, dtype=torch.int32), MOST_SORTED_EXPERTS + 1)],
)  # fmt: skip
def test_what_cannot_be_sorted_is_refused(ids: torch.Tensor, experts: int) -> None:
    with pytest.raises(MoEExtError, match="expected int32 or int64"):
        launch_sort(ids, experts, 64)


def test_scales_of_another_shape_are_refused() -> None:
    quantized = QuantizedTokens(torch.empty(4, 256, dtype=torch.float8_e4m3fn), torch.empty(4, 3))
    with pytest.raises(MoEExtError, match="expected \\[tokens, hidden\\] twice"):
        launch_sort(torch.zeros(4, 1, dtype=torch.int32), 2, 16, hidden=torch.empty(4, 256), quantized=quantized)
