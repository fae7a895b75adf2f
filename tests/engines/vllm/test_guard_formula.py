"""What our guard says of a launch's shared memory, against vLLM's own kernel, compiled for GPUs that are not here."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest

from tests.engines.installed import run_in_vllm, vllm_environment

pytestmark = pytest.mark.usefixtures("forked_engines")

CHILD = Path(__file__).parents[1] / "children" / "vllm_smem.py"
TOLERANCE_BYTES = 1126
"""What block-wise scales add, as in tests/kernels/test_fused_moe_compile.py."""
TILES = ([16, 128, 128, 4, 4], [64, 64, 64, 4, 3], [128, 128, 256, 8, 3])
KINDS = ("bf16", "int8", "fp8-tensor", "fp8-block")
NEWEST = [(sm, kind, tuple(tile)) for sm, kind, tile in itertools.product((89, 90, 120), KINDS, TILES)]
UNSWAPPED = [(90, kind, (64, 128, 128, 4, 3)) for kind in KINDS]
"""Releases up to 0.20 do not swap the operands of small tiles; those of 64 rows none does."""


@functools.cache
def compiled(version: str) -> dict[object, tuple[int, int]]:
    """By what was asked: bytes of the binary, and bytes by the formula."""
    asked = NEWEST if version == "0.33.0" else UNSWAPPED
    said = run_in_vllm(CHILD, asked, vllm_environment(version), timeout=600)
    return {it: (needed, formula) for it, (needed, formula) in zip(asked, said, strict=True)}


@pytest.mark.parametrize(
    ("version", "asked"),
    [*(("0.33.0", it) for it in NEWEST), *((version, it) for version in ("0.20.2", "0.25.1") for it in UNSWAPPED)],
    ids=str,
)
def test_the_formula_is_what_the_binary_needs(version: str, asked: object) -> None:
    needed, formula = compiled(version)[asked]
    assert formula <= needed <= formula + TOLERANCE_BYTES
