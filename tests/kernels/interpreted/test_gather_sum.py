"""The weighted sum of a token's rows against plain torch, on poisoned outputs."""

import pytest
import torch

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.kernels import reference
from sglang_moe_ext.kernels.gather_sum import GatherConfig, gather_config, launch_gather_sum

NAN = float("nan")


@pytest.mark.parametrize("hidden", [72, 320])
@pytest.mark.parametrize("tokens", [1, 17, 65])
@pytest.mark.parametrize("config", [None, GatherConfig(4, 64, 1), GatherConfig(1, 128, 1)], ids=str)
def test_the_sum_of_a_tokens_rows_is_in_order_and_scaled(config: GatherConfig | None, tokens: int, hidden: int) -> None:
    torch.manual_seed(tokens)
    rows = torch.randn(300, hidden).bfloat16()
    positions = torch.randint(-1, 300, (tokens, 5), dtype=torch.int32)
    weights = torch.rand(tokens, 5)
    out = torch.full((tokens, hidden), NAN, dtype=torch.bfloat16)
    launch_gather_sum(rows, positions, weights, out, routed_scaling_factor=2.5, config=config)
    want = reference.gather_sum(rows, positions, weights, 2.5)
    torch.testing.assert_close(out, want.bfloat16(), rtol=2**-7, atol=0)


def test_a_row_without_position_is_not_read() -> None:
    rows = torch.full((4, 64), NAN, dtype=torch.bfloat16)
    out = torch.full((3, 64), NAN, dtype=torch.bfloat16)
    launch_gather_sum(rows, torch.full((3, 2), -1, dtype=torch.int32), torch.ones(3, 2), out)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("tokens", [1, 64, 65, 16384])
@pytest.mark.parametrize("hidden", [128, 768, 2048, 2880, 7168])
def test_a_sum_has_a_thread_for_every_16_bytes(hidden: int, tokens: int) -> None:
    config = gather_config(tokens, hidden)
    assert config.num_warps in {1, 2, 4}
    assert config.tokens * config.columns == config.num_warps * 32 * 8 or config.num_warps == 1


def test_tensors_of_other_shapes_are_refused() -> None:
    rows, out = torch.zeros(4, 64), torch.zeros(3, 32)
    with pytest.raises(MoEExtError, match="do not go together"):
        launch_gather_sum(rows, torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2), out)
