"""Every scheme against the real engines: layouts and scales as their kernels mean them, TMA, names of tables.

The kernels run in Triton's interpreter, one child process a version; the child says what takes the place of CUDA there.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.core import ActivationDtype, MoEShape, Projection, Quantization
from sglang_moe_ext.engines.sglang import support, table_names
from tests.engines.installed import ENGINE_VERSIONS, run_in_engine

CHILD = Path(__file__).parent / "children" / "dtypes.py"
DEVICE = "NVIDIA H200"
INTERPRETED_VERSIONS = ("0.5.8", "0.5.15", "0.5.23")
BOUND = {"bfloat16": 3e-3, "float16": 4e-4}
"""Of the relative error: the output is rounded once, and so are weights that the kernel turns into 16 bits.

Both are off by up to half a unit in the last of 8 or of 11 binary places, 2 ** -9 or 2 ** -12.
"""

SCHEMES: dict[str, tuple[ActivationDtype, Quantization]] = {
    "bf16": ("bfloat16", Quantization()),
    "fp16": ("float16", Quantization()),
    "fp8-block": ("bfloat16", Quantization("fp8_w8a8", (32, 32))),
    "fp8-narrow-block": ("bfloat16", Quantization("fp8_w8a8", (16, 32))),
    "fp8-channel": ("bfloat16", Quantization("fp8_w8a8", per_channel=True)),
    "fp8-tensor": ("bfloat16", Quantization("fp8_w8a8")),
    "int8-block": ("bfloat16", Quantization("int8_w8a8", (32, 32))),
    "int8-channel": ("bfloat16", Quantization("int8_w8a8", per_channel=True)),
    "int8-weights-channel": ("bfloat16", Quantization("int8_w8a16", per_channel=True)),
    "int8-weights-group": ("bfloat16", Quantization("int8_w8a16", (0, 32))),
    "int4-group": ("bfloat16", Quantization("int4_w4a16", (0, 32))),
    "int4-wide-group": ("bfloat16", Quantization("int4_w4a16", (0, 64))),
    "int4-group-fp16": ("float16", Quantization("int4_w4a16", (0, 32))),
}
GROUPED = [name for name in SCHEMES if "group" in name]
SIZES = {"whole-blocks": (64, 128), "cut-blocks": (96, 160)}
"""(intermediate, hidden): blocks of 64 along K divide the first and not the second."""
PROJECTIONS: tuple[Projection, ...] = ("up", "down")


@dataclasses.dataclass(frozen=True)
class Gemm:
    """One launch: `change` names what is done to it, as children/dtypes.py knows it."""

    scheme: str
    projection: Projection
    size: str = "whole-blocks"
    use_tma: bool = False
    change: str = ""

    @property
    def shape(self) -> MoEShape:
        dtype, quantization = SCHEMES[self.scheme]
        return MoEShape(4, *SIZES[self.size], 2, quantization, dtype)

    @property
    def bound(self) -> float:
        return BOUND[self.shape.dtype]

    def request(self) -> dict[str, Any]:
        # One scale a step: a block of the kernel may not span two of them along K.
        block_k = 32 if self.shape.quantization.is_block_wise else 64
        return {
            "shape": dataclasses.asdict(self.shape),
            "projection": self.projection,
            "tile": [16, 32, block_k, 2, 4, 2, self.use_tma],
            "change": self.change,
        }


PLAIN = [Gemm(*case) for case in itertools.product(SCHEMES, PROJECTIONS, SIZES)]
UP_TMA = [Gemm(scheme, "up", "cut-blocks", use_tma=True) for scheme in SCHEMES]
DOWN_TMA = [
    Gemm(scheme, "down", "cut-blocks", True, "unwritten padding") for scheme in SCHEMES if scheme not in GROUPED
]
CLEAN_PADDING = {scheme: Gemm(scheme, "down", use_tma=True) for scheme in ("fp8-tensor", "fp8-channel", "int8-channel")}
SWAPPED = Gemm("int4-group", "up", change="nibbles swapped")
WRITES_IN_PAIR_ORDER = [Gemm(scheme, "up", change="told to sort") for scheme in GROUPED]
READS_IN_PAIR_ORDER = [Gemm(scheme, "down", use_tma=True, change="rows in the order of pairs") for scheme in GROUPED]
GEMMS = [*PLAIN, *UP_TMA, *DOWN_TMA, *CLEAN_PADDING.values(), SWAPPED, *WRITES_IN_PAIR_ORDER, *READS_IN_PAIR_ORDER]


@functools.cache
def asked(version: str) -> dict[str, Any] | AssertionError:
    gemms = GEMMS if version in INTERPRETED_VERSIONS else []
    request = {
        "gemms": [gemm.request() for gemm in gemms],
        "names": [{"shape": dataclasses.asdict(Gemm(scheme, "up").shape), "device": DEVICE} for scheme in SCHEMES],
    }
    try:
        answer: dict[str, Any] = run_in_engine(version, CHILD, request, env={"TRITON_INTERPRET": "1"}, timeout=600)
    except AssertionError as failure:
        return failure  # once, not once a test
    return answer


def engine(version: str) -> dict[str, Any]:
    answer = asked(version)
    if isinstance(answer, AssertionError):
        raise answer
    return answer


def error(version: str, gemm: Gemm) -> float:
    """Of the engine's kernel against the reference."""
    said = engine(version)["errors"][GEMMS.index(gemm)]
    return float("inf") if said is None else float(said)


def named(gemm: Gemm) -> str:
    return f"{gemm.scheme}-{gemm.projection}-{gemm.size}"


interpreted = pytest.mark.parametrize("version", INTERPRETED_VERSIONS)


@interpreted
@pytest.mark.parametrize("gemm", PLAIN, ids=named)
def test_the_engines_kernel_reads_our_operands_as_the_reference_does(gemm: Gemm, version: str) -> None:
    assert error(version, gemm) < gemm.bound


@interpreted
def test_int4_weights_with_their_nibbles_swapped_are_other_weights(version: str) -> None:
    assert error(version, SWAPPED) > 0.5


@interpreted
@pytest.mark.parametrize("gemm", UP_TMA, ids=named)
def test_up_tma_is_right_with_every_scheme(gemm: Gemm, version: str) -> None:
    assert error(version, gemm) < gemm.bound


@interpreted
@pytest.mark.parametrize("gemm", DOWN_TMA, ids=named)
def test_down_tma_is_right_just_where_we_say(gemm: Gemm, version: str) -> None:
    assert (error(version, gemm) < gemm.bound) == support.down_tma_is_right(gemm.shape.quantization)


@interpreted
@pytest.mark.parametrize("scheme", ["fp8-channel", "int8-channel"])
def test_under_down_tma_rows_take_the_scales_of_others_whatever_pads_them(scheme: str, version: str) -> None:
    assert error(version, CLEAN_PADDING[scheme]) > 0.1


@interpreted
def test_under_down_tma_rows_that_nobody_wrote_alone_spoil_the_scale_of_a_tensor(version: str) -> None:
    gemm = CLEAN_PADDING["fp8-tensor"]
    assert error(version, gemm) < gemm.bound


@interpreted
@pytest.mark.parametrize("gemm", WRITES_IN_PAIR_ORDER, ids=named)
def test_the_kernel_for_groups_writes_in_the_order_of_pairs_when_told_to_sort(gemm: Gemm, version: str) -> None:
    assert error(version, gemm) < gemm.bound


@interpreted
@pytest.mark.parametrize("gemm", READS_IN_PAIR_ORDER, ids=named)
def test_the_kernel_for_groups_reads_in_the_order_of_pairs_under_down_tma(gemm: Gemm, version: str) -> None:
    assert error(version, gemm) < gemm.bound


@pytest.mark.parametrize("scheme", GROUPED)
def test_tma_is_never_asked_for_by_groups(scheme: str) -> None:
    quantization = SCHEMES[scheme][1]
    assert not support.down_tma_is_right(quantization)
    assert not support.up_tma_is_right(quantization, (0, 5, 23))


@pytest.mark.parametrize(("version", "right"), [((0, 5, 17), False), ((0, 5, 18), True), ((0, 6, 0), True)])
def test_up_tma_came_with_0_5_18(version: tuple[int, int, int], right: bool) -> None:
    assert support.up_tma_is_right(Quantization(), version) is right


@pytest.mark.parametrize("version", ENGINE_VERSIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_as_we_store_them_ask_for_the_tables_that_we_write(scheme: str, version: str) -> None:
    shape = Gemm(scheme, "up").shape
    ours = [table_names.file_name(table_names.table_key(shape, DEVICE, down=down)) for down in (False, True)]
    assert engine(version)["names"][list(SCHEMES).index(scheme)] == ours
