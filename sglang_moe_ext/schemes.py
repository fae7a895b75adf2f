"""One row for each quantization scheme; every table keyed by a scheme is read from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scheme = Literal["fp8_w8a8", "int8_w8a8", "int8_w8a16", "int4_w4a16"]
Scales = Literal["none", "tensor", "channel", "block", "group"]
"""What one scale covers: a whole tensor, an output channel, a block of N and K, or a group along K of one channel."""


@dataclass(frozen=True, slots=True)
class SchemeRow:
    """Facts of one scheme. `name` None: weights that are not quantized.

    `stored_dtype` is torch's name of one stored element, which holds `weights_per_element` weights; None: the
    activations' own. `largest` is the value that the largest weight of a group becomes.

    `scales` are the layouts that the engines' Triton kernels read; `down_tma` those with which a down GEMM with
    USE_TMA computes what it computes without (engines/sglang/support.py says why); `sorted_kernels` those that our own
    kernels multiply.

    `tolerated_error` is the relative error of the whole layer against float32 that a right result stays under: 4e-3
    seen for bf16, 2.3e-2 for fp8 (H200). The reference takes quantized weights as they are stored, so they add nothing;
    eight-bit activations of the down GEMM are quantized from what the up GEMM rounded otherwise than the reference.

    `vllm_tag`: vLLM puts the scheme into the names of its tables. `swaps_operands`: on sm_90 the engines' kernel gives
    wgmma the weights as rows where the tokens are fewer than 64.
    """

    name: Scheme | None
    weight_bits: int
    activation_bits: int
    stored_dtype: str | None
    largest: float | None
    tolerated_error: float
    scales: frozenset[Scales]
    down_tma: frozenset[Scales]
    sorted_kernels: frozenset[Scales] = frozenset()
    weights_per_element: int = 1
    vllm_tag: bool = True
    swaps_operands: bool = False

    @property
    def launch_flag(self) -> str:
        """The argument of both engines' launchers and layers that stands for the scheme."""
        return f"use_{self.name}"


NOT_QUANTIZED = SchemeRow(
    name=None,
    weight_bits=16,
    activation_bits=16,
    stored_dtype=None,
    largest=None,
    tolerated_error=1e-2,
    scales=frozenset({"none"}),
    down_tma=frozenset({"none"}),
    sorted_kernels=frozenset({"none"}),
    vllm_tag=False,
)
_ROWS = (
    SchemeRow(
        name="fp8_w8a8",
        weight_bits=8,
        activation_bits=8,
        stored_dtype="float8_e4m3fn",
        largest=448.0,
        tolerated_error=5e-2,
        scales=frozenset({"tensor", "channel", "block"}),
        down_tma=frozenset({"block"}),
        sorted_kernels=frozenset({"channel", "block"}),
        swaps_operands=True,
    ),
    SchemeRow(
        name="int8_w8a8",
        weight_bits=8,
        activation_bits=8,
        stored_dtype="int8",
        largest=127.0,
        tolerated_error=5e-2,
        scales=frozenset({"tensor", "channel", "block"}),
        down_tma=frozenset({"block"}),
        vllm_tag=False,
    ),
    SchemeRow(
        name="int8_w8a16",
        weight_bits=8,
        activation_bits=16,
        stored_dtype="uint8",
        largest=127.0,
        tolerated_error=1e-2,
        scales=frozenset({"channel", "group"}),
        down_tma=frozenset({"channel", "tensor"}),
    ),
    SchemeRow(
        name="int4_w4a16",
        weight_bits=4,
        activation_bits=16,
        stored_dtype="uint8",
        largest=7.0,
        tolerated_error=1e-2,
        scales=frozenset({"group"}),
        down_tma=frozenset(),
        weights_per_element=2,
    ),
)
SCHEMES: dict[str, SchemeRow] = {row.name: row for row in _ROWS if row.name is not None}


def find_row(scheme: str | None) -> SchemeRow:
    """The row of a scheme.

    Raises:
        KeyError: there is no such scheme.
    """
    return NOT_QUANTIZED if scheme is None else SCHEMES[scheme]
