"""The rules for AMD GPUs leave the very candidates that vLLM's own tuner leaves.

Counts and digests: vLLM 0.33.0's sdist, benchmarks/kernels/benchmark_moe.py, run by `python -m tools.vllm_space`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import astuple

import pytest

from sglang_moe_ext.core import MoEShape, Quantization
from sglang_moe_ext.tuning.search import rocm_space, space
from sglang_moe_ext.tuning.search.rocm_space import RULES, Family, RocmTile

SPACES = {("CDNA", True): 40_000, ("RDNA", True): 10_000, ("CDNA", False): 8_000, ("RDNA", False): 8_000}
SMALL, WIDE, MIXTRAL = (768, 2048, 8), (1536, 2048, 4), (14336, 4096, 2)
"""Columns of one half of the up GEMM, hidden size, top-k."""
ODD = (24, 2000, 8)
LEFT = {
    ("CDNA", True, 1, SMALL): (704, "f242c9904aec"),
    ("CDNA", True, 16, WIDE): (4992, "905650351695"),
    ("CDNA", True, 64, SMALL): (15296, "9efae78e0e71"),
    ("CDNA", True, 1024, MIXTRAL): (1888, "e5310236f5e5"),
    ("CDNA", False, 1, SMALL): (304, "bfb3e4b2707a"),
    ("CDNA", False, 16, WIDE): (1520, "6ff75d477bf6"),
    ("CDNA", False, 64, SMALL): (4496, "a1bb97e6a605"),
    ("CDNA", False, 1024, MIXTRAL): (720, "aa614d4bd132"),
    ("RDNA", True, 1, SMALL): (352, "ca0ae80992ae"),
    ("RDNA", True, 16, WIDE): (1576, "e66bea3bf8a3"),
    ("RDNA", True, 64, SMALL): (4616, "65118718be1d"),
    ("RDNA", True, 1024, MIXTRAL): (420, "8a2988fb2946"),
    ("RDNA", False, 1, SMALL): (304, "bfb3e4b2707a"),
    ("RDNA", False, 16, WIDE): (1384, "c550a9218068"),
    ("RDNA", False, 64, SMALL): (4040, "071566683ebf"),
    ("RDNA", False, 1024, MIXTRAL): (616, "d86cf3179c26"),
}


def shape_of(layer: tuple[int, int, int], *, is_wide: bool) -> MoEShape:
    intermediate_size, hidden_size, top_k = layer
    quantization = Quantization() if is_wide else Quantization("fp8_w8a8")
    return MoEShape(64, intermediate_size, hidden_size, top_k, quantization)


@functools.cache
def full(family: Family, is_wide: bool) -> tuple[RocmTile, ...]:
    return rocm_space.full_space(shape_of(SMALL, is_wide=is_wide), family)


def digest(tiles: tuple[RocmTile, ...]) -> str:
    rows = sorted([number or 0 for number in astuple(tile)] for tile in tiles)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


@pytest.mark.parametrize(("family", "is_wide"), SPACES)
def test_the_space_is_as_large_as_upstreams(family: Family, is_wide: bool) -> None:
    assert len(full(family, is_wide)) == SPACES[family, is_wide]


@pytest.mark.parametrize("case", LEFT, ids=str)
def test_the_rules_leave_what_upstream_leaves(case: tuple[Family, bool, int, tuple[int, int, int]]) -> None:
    family, is_wide, tokens, layer = case
    left = rocm_space.kept(full(family, is_wide), shape_of(layer, is_wide=is_wide), tokens, family)
    assert (len(left), digest(left)) == LEFT[case]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_each_rule_drops_something_that_no_other_does(rule: rocm_space.RocmRule) -> None:
    others = [it for it in RULES if it is not rule]
    for family, is_wide, tokens, layer in (*LEFT, ("CDNA", True, 64, ODD)):
        gemm = rocm_space.gemm(shape_of(layer, is_wide=is_wide), "up", tokens, family)
        for tile in full(family, is_wide):
            if not rule.keeps(tile, gemm) and all(other.keeps(tile, gemm) for other in others):
                return
    pytest.fail(f"{rule.name} says nothing that the others do not")


def test_on_cuda_the_space_is_upstreams_too() -> None:
    assert len(set(space.full_space())) == 1920
