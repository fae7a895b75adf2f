"""The sum of a token's rows, compiled for a GPU that need not be here."""

import os
import re

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler, not its interpreter", allow_module_level=True)

from offline_down import compiled, waits_first

from sglang_moe_ext.kernels import dependent_launch
from sglang_moe_ext.kernels.compiled import resources_of
from sglang_moe_ext.kernels.gather_sum import gather_config, gather_sum_kernel, sum_arguments


@pytest.mark.parametrize("slots", [1, 8, 9])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 2048), (4096, 2048), (4096, 7168), (4096, 256)])
def test_the_sum_waits_reads_16_bytes_at_a_time_and_does_not_spill(tokens: int, hidden: int, slots: int) -> None:
    config = gather_config(tokens, hidden)
    with torch.device("meta"):
        rows, out = (torch.empty(64, hidden, dtype=torch.bfloat16) for _ in range(2))
        positions, weights = torch.empty(tokens, slots, dtype=torch.int32), torch.empty(tokens, slots)
    arguments = sum_arguments(rows, positions, weights, out, 2.5, config) | dependent_launch.options(True)
    sums = compiled(90, gather_sum_kernel, arguments)
    assert waits_first(sums.asm["ptx"])
    assert resources_of(sums).spill_bytes == 0
    assert len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", sums.asm["ptx"])) == slots
    assert sums.asm["ptx"].count(".v4.b32 [") >= 1
