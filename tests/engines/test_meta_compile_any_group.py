"""The binary that takes GROUP_SIZE_M as an argument needs what the engine's own needs, in real engines."""

from __future__ import annotations

import functools
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.core import CompileJob, CompileKey, MoEShape, Projection, Quantization, Target
from tests.engines.installed import run_in_engine

pytestmark = pytest.mark.usefixtures("forked_engines")

CHILD = Path(__file__).parent / "children" / "compile_jobs.py"
VERSIONS = ("0.5.8", "0.5.15", "0.5.23")
BF16 = MoEShape(128, 768, 2048, 8)
FP8_BLOCK = MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", (128, 128)))
INT4 = MoEShape(128, 768, 2048, 8, Quantization("int4_w4a16", (0, 32)))


def job(shape: MoEShape, projection: Projection, key: CompileKey, *, sorted_rows: bool = False) -> CompileJob:
    return CompileJob(shape, projection, 1024, key, Target(90), sorted_rows=sorted_rows)


JOBS = {
    "bf16 up": job(BF16, "up", CompileKey(64, 128, 64, 4, 3)),
    "bf16 up, sorted rows": job(BF16, "up", CompileKey(64, 128, 64, 4, 3), sorted_rows=True),
    "bf16 down by TMA": job(BF16, "down", CompileKey(64, 128, 64, 4, 3, use_tma=True)),
    "fp8 block down": job(FP8_BLOCK, "down", CompileKey(16, 128, 128, 4, 3)),
    "int4 up": job(INT4, "up", CompileKey(16, 64, 64, 4, 3)),
}
GROUPS = (None, 1, 16)
REGISTERS_APART = 2
"""Seen: one more or less. The order of the programs is worked out once, before the loop."""


@functools.cache
def needs(version: str) -> dict[tuple[str, int | None], dict[str, Any]]:
    """What each job needs with each group in that version, all from one process."""
    asked = [(name, group) for name in JOBS for group in GROUPS]
    answers = run_in_engine(version, CHILD, [asdict(replace(JOBS[name], group_m=group)) for name, group in asked])
    return dict(zip(asked, answers, strict=True))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("group", [1, 16])
def test_the_group_changes_nothing_that_a_binary_needs(version: str, name: str, group: int) -> None:
    any_group, own = needs(version)[name, None], needs(version)[name, group]
    assert (any_group["smem"], any_group["spill"]) == (own["smem"], own["spill"])
    assert abs(any_group["registers"] - own["registers"]) <= REGISTERS_APART
