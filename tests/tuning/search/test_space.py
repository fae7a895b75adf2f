"""The rules against the compiler: what they keep can launch, what they drop could not have run clean.

tests/data/compiled has every binary of one layer that could fit, compiled through engines/sglang/compile.py with SGLang
0.5.23 and Triton 3.7.1 on 2026-11-21: one file for each architecture and dtype. Before sm_89 Triton refuses fp8.
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

from sglang_moe_ext.core import CompileJob, Gpu, MoEShape, Quantization, Target, TileConfig
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.gpu.shared_memory import smem_bytes
from sglang_moe_ext.tuning.search import space
from tests.engines.installed import run_in_engine

DATA = Path(__file__).parents[2] / "data" / "compiled"
COMPILE_JOBS = Path(__file__).parents[2] / "engines" / "children" / "compile_jobs.py"
SHAPES = {
    "bf16": MoEShape(128, 768, 2048, 8),
    "fp8_block": MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", (128, 128))),
}
GPUS = {80: "A100", 86: "A10", 89: "L40S", 90: "H200", 100: "B200", 120: "RTX 5090"}
GRIDS = [(80, "bf16"), (86, "bf16"), *((sm, dtype) for sm in (89, 90, 100, 120) for dtype in SHAPES)]
MOST_ABOVE_BYTES = {
    "bf16": {80: 0, 86: 0, 89: 0, 90: 0, 100: 16, 120: 0},
    "fp8_block": {89: 1024, 90: 1024, 100: 2064, 120: 1024},
}
"""How far the compiler's shared memory lies above `smem_bytes` at most where RULES keep: block scales, barriers."""
RESULT_BYTES = 2
"""Before sm_90 the tile of results passes through shared memory too, in the place of the stages: the larger counts."""

every_grid = pytest.mark.parametrize(("sm", "dtype"), GRIDS, ids=[f"sm_{sm} {dtype}" for sm, dtype in GRIDS])


@functools.cache
def grid(sm: int, dtype: str) -> dict[TileConfig, dict[str, Any]]:
    """What the compiler said of each configuration."""
    lines = (DATA / f"sm_{sm}_{dtype}.jsonl").read_text().splitlines()
    return {
        TileConfig(block_m, block_n, block_k, 1, warps, stages): record
        for record in map(json.loads, lines)
        for block_m, block_n, block_k, warps, stages in [record["key"]]
    }


@functools.cache
def kept(sm: int, dtype: str) -> frozenset[TileConfig]:
    candidates = [config for config in space.full_space() if config.group_m == 1]
    return frozenset(space.prune(candidates, SHAPES[dtype], find_gpu(GPUS[sm])).kept)


def can_launch(record: dict[str, Any], gpu: Gpu) -> bool:
    return "failure" not in record and record["smem"] <= gpu.smem_per_block


def test_the_space_is_the_1920_configurations_of_upstream() -> None:
    assert len(set(space.full_space())) == 1920


def test_the_space_is_480_binaries() -> None:
    assert len({config.compile_key for config in space.full_space()}) == 480


@every_grid
def test_every_candidate_that_is_kept_was_compiled(sm: int, dtype: str) -> None:
    assert kept(sm, dtype) - set(grid(sm, dtype)) == set()


@every_grid
def test_no_candidate_that_is_kept_cannot_launch(sm: int, dtype: str) -> None:
    gpu = find_gpu(GPUS[sm])
    assert [config for config in kept(sm, dtype) if not can_launch(grid(sm, dtype)[config], gpu)] == []


@every_grid
def test_no_candidate_that_is_dropped_would_have_run_without_spilling(sm: int, dtype: str) -> None:
    gpu, records = find_gpu(GPUS[sm]), grid(sm, dtype)
    dropped = set(records) - kept(sm, dtype)
    assert [config for config in dropped if can_launch(records[config], gpu) and not records[config]["spill"]] == []


@every_grid
def test_the_shared_memory_is_never_less_than_predicted(sm: int, dtype: str) -> None:
    shape = SHAPES[dtype]
    below = [c for c, record in grid(sm, dtype).items() if record["smem"] < smem_bytes(c, shape, Target(sm))]
    assert below == []


def most_smem_bytes(config: TileConfig, sm: int, dtype: str) -> int:
    stages = smem_bytes(config, SHAPES[dtype], Target(sm)) + MOST_ABOVE_BYTES[dtype][sm]
    return max(stages, config.block_m * config.block_n * RESULT_BYTES) if sm < 90 else stages


@every_grid
def test_the_shared_memory_of_what_is_kept_lies_close_above_the_prediction(sm: int, dtype: str) -> None:
    records = grid(sm, dtype)
    assert [c for c in kept(sm, dtype) if records[c]["smem"] > most_smem_bytes(c, sm, dtype)] == []


def test_the_compiler_of_today_says_what_the_grid_says() -> None:
    """Four binaries of the grid, others in each run, made again with the real engine."""
    seed = random.randrange(2**32)
    clean = [(*of, config) for of in GRIDS for config in sorted(kept(*of)) if not grid(*of)[config]["spill"]]
    chosen = random.Random(seed).sample(clean, 4)  # of those that do not spill: they compile in a second
    jobs = [CompileJob(SHAPES[dtype], "up", 1024, config.compile_key, Target(sm)) for sm, dtype, config in chosen]
    found = [said.get("smem") for said in run_in_engine("0.5.23", COMPILE_JOBS, [asdict(job) for job in jobs])]
    assert found == [grid(sm, dtype)[config]["smem"] for sm, dtype, config in chosen], f"seed {seed}: {chosen}"


# For each rule a configuration that it drops, and one beside it that it keeps, on one GPU and layer.
INT4 = MoEShape(128, 768, 2048, 8, Quantization("int4_w4a16", (0, 32)))
NARROW = MoEShape(128, 96, 2048, 8)
BLOCK_64 = MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", (64, 64)))
EXAMPLES = [
    ("quantization block", BLOCK_64, "H200", TileConfig(64, 64, 128, 1, 4, 3), TileConfig(64, 64, 64, 1, 4, 3)),
    ("tile larger than the work", NARROW, "H200", TileConfig(16, 64, 256, 1, 4, 2), TileConfig(16, 64, 128, 1, 4, 2)),
    ("shared memory", SHAPES["bf16"], "A10", TileConfig(64, 64, 128, 1, 4, 5), TileConfig(64, 64, 128, 1, 4, 4)),
    ("accumulator", SHAPES["bf16"], "H200", TileConfig(128, 256, 64, 1, 4, 2), TileConfig(128, 256, 64, 1, 8, 2)),
    ("accumulator", SHAPES["fp8_block"], "H200", TileConfig(128, 128, 64, 1, 4, 2), TileConfig(128, 128, 64, 1, 8, 2)),
]
example_ids = ["block", "padding", "memory", "accumulator", "accumulator of blocks"]


@pytest.mark.parametrize(("rule", "shape", "gpu", "drops", "keeps"), EXAMPLES, ids=example_ids)
def test_a_rule_drops_its_example(rule: str, shape: MoEShape, gpu: str, drops: TileConfig, keeps: TileConfig) -> None:
    found = space.prune([drops], shape, find_gpu(gpu))
    assert (found.kept, +Counter(found.dropped)) == ((), {rule: 1})


@pytest.mark.parametrize(("rule", "shape", "gpu", "drops", "keeps"), EXAMPLES, ids=example_ids)
def test_a_rule_keeps_its_neighbour(rule: str, shape: MoEShape, gpu: str, drops: TileConfig, keeps: TileConfig) -> None:
    assert space.prune([keeps], shape, find_gpu(gpu)).kept == (keeps,)


def test_every_rule_has_an_example() -> None:
    assert {rule for rule, *_ in EXAMPLES} == {rule.name for rule in space.RULES}


def test_on_blackwell_the_accumulator_lies_in_tensor_memory_and_drops_nothing() -> None:
    assert space.prune(space.full_space(), SHAPES["bf16"], find_gpu("B200")).dropped["accumulator"] == 0


@pytest.mark.parametrize("gpu", GPUS.values())
@pytest.mark.parametrize("shape", [*SHAPES.values(), INT4, NARROW], ids=[*SHAPES, "int4", "narrow"])
def test_each_candidate_is_kept_or_counted_once(shape: MoEShape, gpu: str) -> None:
    found = space.prune(space.full_space(), shape, find_gpu(gpu))
    assert len(found.kept) + sum(found.dropped.values()) == 1920


def test_the_count_goes_to_the_first_rule_that_drops() -> None:
    never = [space.Rule(name, "", lambda *_: False) for name in ("first", "second")]
    found = space.prune(space.full_space(), SHAPES["bf16"], find_gpu("H200"), never)
    assert found.dropped == {"first": 1920, "second": 0}
