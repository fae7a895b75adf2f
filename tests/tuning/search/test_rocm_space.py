"""The rules for AMD GPUs against the compiler: what they keep can launch, what they drop could not have run clean.

tests/data/compiled/gfx*: every fourth binary of one layer that could fit, compiled through engines/sglang/compile.py
with SGLang 0.5.23 and Triton 3.7.1 on 2026-11-26 (`python -m benchmarks.compile_grid OUT gfx942 gfx950`).
"""

from __future__ import annotations

import functools
import json
import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.core import CompileJob, CompileKey, GpuError, MoEShape, Quantization, Target, TileConfig
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.gpu.shared_memory import smem_bytes
from sglang_moe_ext.tuning import tune_plan
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.search import rocm_space, space
from tests.engines.installed import run_in_engine

DATA = Path(__file__).parents[2] / "data" / "compiled"
COMPILE_JOBS = Path(__file__).parents[2] / "engines" / "children" / "compile_jobs.py"
SHAPES = {
    "bf16": MoEShape(128, 768, 2048, 8),
    "fp8_block": MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", (128, 128))),
}
GPUS = {"gfx942": "MI300X", "gfx950": "MI355X"}
GRIDS = [(gfx, dtype) for gfx in GPUS for dtype in SHAPES]
MOST_ABOVE_BYTES = {"bf16": 0, "fp8_block": 1024}
"""How far the compiler's LDS lies above `smem_bytes` at most where RULES keep: scales of blocks."""
ONE_INSTRUCTION = 4
"""Accumulators of a lane under one 16x16 matrix instruction. Waves of a smaller tile share one, and its operands."""

every_grid = pytest.mark.parametrize(("gfx", "dtype"), GRIDS, ids=[" ".join(of) for of in GRIDS])


@functools.cache
def grid(gfx: str, dtype: str) -> dict[CompileKey, dict[str, Any]]:
    """What the compiler said of each binary."""
    gpu, shape = find_gpu(GPUS[gfx]), SHAPES[dtype]
    by_tile = {
        (key.block_m, key.block_n, key.block_k, key.num_warps, key.num_stages): key
        for key in (config.compile_key for config in rocm_space.full_space(shape, gpu))
    }
    records = map(json.loads, (DATA / f"{gfx}_{dtype}.jsonl").read_text().splitlines())
    return {by_tile[tuple(record["key"])]: record for record in records}


@functools.cache
def kept(gfx: str, dtype: str) -> frozenset[CompileKey]:
    gpu, shape = find_gpu(GPUS[gfx]), SHAPES[dtype]
    of_grid = [key.with_group(1) for key in grid(gfx, dtype)]
    return frozenset(config.compile_key for config in space.prune(of_grid, shape, gpu, rocm_space.RULES).kept)


@every_grid
def test_no_candidate_that_is_kept_cannot_launch(gfx: str, dtype: str) -> None:
    most = find_gpu(GPUS[gfx]).smem_per_block
    records = grid(gfx, dtype)
    assert [key for key in kept(gfx, dtype) if "failure" in records[key] or records[key]["smem"] > most] == []


@every_grid
def test_no_candidate_that_is_dropped_would_have_run_without_spilling(gfx: str, dtype: str) -> None:
    most, records = find_gpu(GPUS[gfx]).smem_per_block, grid(gfx, dtype)
    dropped = records.keys() - kept(gfx, dtype)
    assert [key for key in dropped if records[key]["smem"] <= most and not records[key]["spill"]] == []


@every_grid
def test_the_lds_is_what_is_predicted_or_little_more(gfx: str, dtype: str) -> None:
    shape, target = SHAPES[dtype], Target(gfx=gfx)
    above = {
        key: grid(gfx, dtype)[key]["smem"] - smem_bytes(key.with_group(1), shape, target) for key in kept(gfx, dtype)
    }
    lanes = {key: space.accumulator_registers(key.with_group(1), target) for key in above}
    least = {key: 0 if lanes[key] >= ONE_INSTRUCTION else -1024 for key in above}
    assert [key for key, more in above.items() if not least[key] <= more <= MOST_ABOVE_BYTES[dtype]] == []


def test_the_compiler_of_today_says_what_the_grid_says() -> None:
    """Three binaries of the grid, others in each run, made again with the real engine, and one on a gfx90a."""
    seed = random.randrange(2**32)
    clean = [
        (gfx, dtype, key)
        for gfx, dtype in GRIDS
        for key in sorted(kept(gfx, dtype))
        if not grid(gfx, dtype)[key]["spill"]
    ]
    chosen = random.Random(seed).sample(clean, 3)
    jobs = [CompileJob(SHAPES[dtype], "up", 1024, key, Target(gfx=gfx)) for gfx, dtype, key in chosen]
    old = CompileKey(64, 128, 64, 4, 2, waves_per_eu=2, matrix_instr_nonkdim=32, kpack=2)
    jobs.append(CompileJob(SHAPES["bf16"], "down", 1024, old, Target(gfx="gfx90a")))
    *found, of_old = run_in_engine("0.5.23", COMPILE_JOBS, [asdict(job) for job in jobs])
    expected = [{name: grid(gfx, dtype)[key][name] for name in ("smem", "spill")} for gfx, dtype, key in chosen]
    assert [{name: said.get(name) for name in ("smem", "spill")} for said in found] == expected, f"seed {seed}"
    assert (of_old["smem"], of_old["spill"]) == (64 * (64 + 128) * 2, 0)
    assert of_old["registers"] <= 256, "two waves of a SIMD share 512 registers"


NARROW, ODD = MoEShape(128, 96, 2048, 8), MoEShape(128, 720, 2000, 8)
BLOCK_64 = MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", (64, 64)))


def tile(block_m: int, block_n: int, block_k: int, warps: int) -> TileConfig:
    return TileConfig(block_m, block_n, block_k, 1, warps, 2)


EXAMPLES = [
    ("quantization block", BLOCK_64, tile(64, 64, 128, 4), tile(64, 64, 64, 4)),
    ("tile larger than the work", NARROW, tile(16, 64, 256, 4), tile(16, 64, 32, 4)),
    ("reduction", ODD, tile(16, 64, 64, 4), tile(16, 64, 16, 4)),
    ("shared memory", SHAPES["bf16"], tile(128, 256, 128, 8), tile(128, 128, 128, 8)),
    ("accumulator", SHAPES["bf16"], tile(256, 128, 64, 1), tile(128, 128, 64, 1)),
    ("accumulator", SHAPES["fp8_block"], tile(128, 128, 64, 1), tile(128, 128, 64, 2)),
]
every_example = pytest.mark.parametrize(("rule", "shape", "drops", "keeps"), EXAMPLES)


@every_example
def test_a_rule_drops_its_example_and_keeps_its_neighbour(
    rule: str, shape: MoEShape, drops: TileConfig, keeps: TileConfig
) -> None:
    found = space.prune([drops, keeps], shape, find_gpu("MI300X"), rocm_space.RULES)
    assert (found.kept, +Counter(found.dropped)) == ((keeps,), {rule: 1})


def test_every_rule_has_an_example() -> None:
    assert {rule for rule, *_ in EXAMPLES} == {rule.name for rule in rocm_space.RULES}


def test_what_a_gfx942_cannot_hold_a_gfx950_can() -> None:
    large = tile(128, 256, 128, 8)
    assert space.prune([large], SHAPES["bf16"], find_gpu("MI355X"), rocm_space.RULES).kept == (large,)


@pytest.mark.parametrize(
    ("gpu", "dtype", "options"),
    [("MI300X", "bf16", (16, 2)), ("MI355X", "bf16", (16, 1)), ("MI300X", "fp8_block", (0, 1))],
)
def test_the_options_are_those_that_win_in_shipped_tables(gpu: str, dtype: str, options: tuple[int, int]) -> None:
    found = tune_plan.prune_space(Problem(SHAPES[dtype], find_gpu(gpu), "sglang")).kept
    assert {(config.matrix_instr_nonkdim, config.kpack) for config in found} == {options}


def test_float8_is_refused_where_the_matrix_units_have_none() -> None:
    with pytest.raises(GpuError, match=r"MI250X \(gfx90a\) has no fp8 matrix units: expected gfx942"):
        tune_plan.prune_space(Problem(SHAPES["fp8_block"], find_gpu("MI250X"), "vllm"))
