"""`kernels.grouped_gemm` against `reference.grouped_gemm`, on poisoned outputs."""

import pytest
import torch
from moe_problems import QUANTIZATIONS

from sglang_moe_ext import kernels
from sglang_moe_ext.core import MoEExtError, Quantization, TileConfig
from sglang_moe_ext.kernels.quantize import Scales, as_the_gemm_reads, quantize_weights
from sglang_moe_ext.kernels.reference import grouped_gemm, relative_error

KINDS = {
    **QUANTIZATIONS,
    "fp32": (torch.float32, Quantization()),
    "int8-weights": (torch.bfloat16, Quantization("int8_w8a16", per_channel=True)),
}
BOUND = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4, torch.float32: 1e-6}
SMALL, TALL = TileConfig(16, 16, 32, 1, 4, 2), TileConfig(32, 32, 16, 4, 4, 2)
SIZES = {
    "an expert without rows": (3, 0, 17, 1),
    "all to one": (0, 0, 40, 0),
    "one row": (0, 1, 0, 0),
    "whole": (32,) * 4,
}


def run(kind: str, sizes: tuple[int, ...], config: TileConfig | None, k: int = 72, columns: int = 40) -> None:
    torch.manual_seed(sum(sizes))
    dtype, quantization = KINDS[kind]
    owners = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    offsets = torch.tensor([0, *sizes]).cumsum(0).int()
    b = (torch.randn(len(sizes), columns, k) * torch.arange(1, len(sizes) + 1).view(-1, 1, 1) / 4).to(dtype)
    a, scales = torch.randn(sum(sizes), k).to(dtype), None
    if quantization.scheme is not None:
        b, b_scale = quantize_weights(b, quantization)
        a, scales = as_the_gemm_reads(a, b_scale, quantization)
    out = torch.full((sum(sizes), columns), float("nan"), dtype=dtype)
    assert kernels.grouped_gemm(a, b, offsets, scales=scales, out=out, config=config) is out
    expected = grouped_gemm(a, b, owners.view(-1, 1), top_k=1, scales=scales)
    assert relative_error(out, expected) < BOUND[dtype]


@pytest.mark.parametrize("config", [SMALL, TALL], ids=["small", "tall"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_is_right_with_an_empty_expert(kind: str, config: TileConfig) -> None:
    run(kind, SIZES["an expert without rows"], config)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_split_of_the_rows_is_right_with_the_default_tile(sizes: tuple[int, ...]) -> None:
    run("bf16", sizes, None)


def test_rows_behind_the_last_offset_stay_as_they_are() -> None:
    a, b, out = torch.randn(9, 32), torch.randn(2, 16, 32), torch.full((9, 16), float("nan"))
    kernels.grouped_gemm(a, b, torch.tensor([0, 3, 5]).int(), out=out)
    assert out[:5].isfinite().all() and out[5:].isnan().all()


def test_no_rows_launch_nothing() -> None:
    assert kernels.grouped_gemm(torch.empty(0, 32), torch.randn(2, 16, 32), torch.zeros(3).int()).shape == (0, 16)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"a": torch.randn(4, 31)}, r"do not fit"),
        ({"offsets": torch.tensor([0, 2, 4])}, r"expected int32 \[3\]"),
        ({"a": torch.randn(4, 32).half()}, "without scales"),
        ({"out": torch.empty(4, 15)}, "out"),
        ({"scales": Scales(Quantization("int4_w4a16", (0, 32)), None, torch.ones(2, 16, 1))}, "int4_w4a16"),
        ({"config": TileConfig(16, 16, 32, 1, 4, 2, use_tma=True)}, "USE_TMA"),
    ],
    ids=["K", "offsets", "dtypes", "out", "scheme", "TMA"],
)
def test_what_does_not_go_together_is_refused_by_name(change: dict[str, object], says: str) -> None:
    given = {"a": torch.randn(4, 32), "b": torch.randn(2, 16, 32), "offsets": torch.tensor([0, 2, 4]).int(), **change}
    with pytest.raises(MoEExtError, match=says):
        kernels.grouped_gemm(**given)
