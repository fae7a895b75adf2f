"""The sort of pairs by expert, compiled for GPUs that need not be here."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler, not its interpreter", allow_module_level=True)

from offline_down import compiled, waits_first

from sglang_moe_ext.kernels import dependent_launch, sort_tokens
from sglang_moe_ext.kernels.compiled import resources_of
from sglang_moe_ext.kernels.sort_tokens import QuantizedTokens, SortedTokens


def arguments(experts: int, tokens: int, scales: int | None) -> dict[object, dict[str, object]]:
    """Of each kernel, for 8 experts a token and 2048 columns."""
    with torch.device("meta"):
        ids = torch.empty(tokens, 8, dtype=torch.int32)
        counts, totals = (
            torch.empty(experts, tokens * 8 // 128, dtype=torch.int32),
            torch.empty(experts, dtype=torch.int32),
        )
        made = SortedTokens(*(torch.empty(64, dtype=torch.int32) for _ in range(3)), torch.empty_like(ids))
        hidden = torch.empty(tokens, 2048, dtype=torch.bfloat16)
        values = torch.empty(tokens, 2048, dtype=torch.float8_e4m3fn)
        quantized = None if scales is None else QuantizedTokens(values, torch.empty(tokens, scales))
        return {
            sort_tokens.count_kernel: sort_tokens.count_arguments(ids, counts, hidden, quantized),
            sort_tokens.scan_kernel: sort_tokens.scan_arguments(counts, totals),
            sort_tokens.place_kernel: sort_tokens.place_arguments(ids, counts, totals, made, 128),
        }


@pytest.mark.parametrize(
    ("sm", "experts", "tokens", "scales"),
    [(80, 128, 16384, None), (90, 128, 16384, 16), (90, 513, 1024, 16), (90, 64, 16384, 1), (120, 257, 4096, 16)],
)
def test_the_sort_does_not_spill_and_leaves_room_for_many_programs(
    sm: int, experts: int, tokens: int, scales: int | None
) -> None:
    for kernel, of_kernel in arguments(experts, tokens, scales).items():
        needs = resources_of(compiled(sm, kernel, of_kernel))
        assert (needs.spill_bytes, needs.registers <= 128, needs.smem_bytes <= 16 * 1024) == (0, True, True)


@pytest.mark.parametrize(("sm", "has_it"), [(80, False), (89, False), (90, True), (100, True), (120, True)])
def test_the_passes_wait_before_their_first_access_where_the_gpu_has_dependent_launch(sm: int, has_it: bool) -> None:
    assert dependent_launch.is_available(sm) == has_it
    for kernel, of_kernel in arguments(128, 1024, None).items():
        made = compiled(sm, kernel, of_kernel | dependent_launch.options(has_it))
        is_first = kernel is sort_tokens.count_kernel
        assert ("griddepcontrol.launch_dependents" in made.asm["ptx"]) == has_it
        assert ("griddepcontrol.wait" in made.asm["ptx"]) == (has_it and not is_first)
        if has_it and not is_first:
            assert waits_first(made.asm["ptx"])
