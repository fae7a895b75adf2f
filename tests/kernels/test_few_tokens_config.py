"""What a configuration of the path for few tokens may be."""

from dataclasses import replace

import pytest

from sglang_moe_ext.core import Quantization
from sglang_moe_ext.few_tokens_config import (
    DownTile,
    FewTokensConfig,
    FewTokensProblem,
    UpTile,
    contenders,
    refusals,
)

BLOCK = Quantization("fp8_w8a8", (128, 128))
QWEN3 = FewTokensProblem(tokens=4, top_k=8, intermediate_size=768, hidden_size=2048, quantization=Quantization())
GROUPED = FewTokensConfig(UpTile(16, 32, 128, 4, 4), DownTile(16, 64, 128, 4, 4, split=8), grouped=True)


@pytest.mark.parametrize(
    ("config", "problem", "rule"),
    [
        (replace(GROUPED, up=UpTile(16, 24, 128, 4, 4)), QWEN3, "sizes"),
        (replace(GROUPED, down=DownTile(16, 8, 128, 4, 4)), QWEN3, "matrix"),
        (GROUPED, replace(QWEN3, tokens=17), "grouped"),
        (replace(GROUPED, down=DownTile(32, 64, 128, 4, 4)), QWEN3, "grouped"),
        (FewTokensConfig(UpTile(32, 32, 128, 4, 4), DownTile(1, 8, 256, 4, 4)), QWEN3, "single"),
        (replace(GROUPED, up=UpTile(16, 32, 256, 4, 4)), replace(QWEN3, quantization=BLOCK), "scales"),
        (GROUPED, replace(QWEN3, quantization=BLOCK, intermediate_size=704), "scales"),
        (FewTokensConfig(UpTile(1, 8, 256, 4, 4), DownTile(1, 8, 256, 4, 4, split=12)), QWEN3, "split"),
        (FewTokensConfig(UpTile(1, 8, 256, 4, 4), DownTile(1, 8, 256, 4, 4, split=8, prefetched=2)), QWEN3, "prefetch"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused_by_name(config: FewTokensConfig, problem: FewTokensProblem, rule: str) -> None:
    assert rule in [broken.name for broken in refusals(config, problem)]


@pytest.mark.parametrize("quantization", [Quantization(), BLOCK, Quantization("int4_w4a16", (0, 128))], ids=str)
@pytest.mark.parametrize("tokens", range(1, 9))
def test_there_is_always_something_to_race_for_up_to_eight_tokens(tokens: int, quantization: Quantization) -> None:
    problem = replace(QWEN3, tokens=tokens, quantization=quantization)
    assert contenders(problem)
    assert not any(refusals(config, problem) for config in contenders(problem))


def test_nothing_is_raced_where_the_path_never_won() -> None:
    assert not contenders(replace(QWEN3, tokens=33))
    assert not contenders(replace(QWEN3, tokens=9, quantization=BLOCK))
