"""The rows of the quantization schemes, and what is read from them."""

from __future__ import annotations

from typing import get_args

import pytest

from sglang_moe_ext.core import Quantization, Scheme
from sglang_moe_ext.engines.vllm import table_names
from sglang_moe_ext.schemes import NOT_QUANTIZED, SCHEMES, find_row


def test_every_scheme_has_one_row() -> None:
    assert tuple(SCHEMES) == get_args(Scheme)


def test_a_scheme_that_is_unknown_has_no_row() -> None:
    with pytest.raises(KeyError):
        find_row("nvfp4")


@pytest.mark.parametrize("row", [NOT_QUANTIZED, *SCHEMES.values()], ids=lambda row: str(row.name))
def test_rules_name_only_scales_that_the_kernels_read(row) -> None:
    assert row.sorted_kernels <= row.scales
    assert row.down_tma - {"tensor"} <= row.scales


@pytest.mark.parametrize(
    ("quantization", "scales"),
    [
        (Quantization(), "none"),
        (Quantization("fp8_w8a8"), "tensor"),
        (Quantization("fp8_w8a8", per_channel=True), "channel"),
        (Quantization("int8_w8a8", (128, 128)), "block"),
        (Quantization("int4_w4a16", (0, 64)), "group"),
    ],
)
def test_a_quantization_says_what_one_scale_covers(quantization: Quantization, scales: str) -> None:
    assert quantization.scales == scales
    assert scales in quantization.row.scales


def test_vllm_has_no_tag_for_int8_with_int8_activations() -> None:
    assert [row.name for row in SCHEMES.values() if table_names.tag(row.name) is None] == ["int8_w8a8"]
