"""The judge of the wave model on AMD GPUs counts what it says it counts."""

from __future__ import annotations

from pathlib import Path

from benchmarks import amd_shipped_tables as benchmark
from sglang_moe_ext.core import MoEShape, TileConfig
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.tables import config_table
from sglang_moe_ext.tuning import tune_plan
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.search import predict

PROBLEM = Problem(MoEShape(128, 768, 2048, 8), find_gpu("MI300X"), "sglang")
ODD = TileConfig(64, 64, 64, 1, 16, 2)
"""Sixteen warps are no candidate."""


def test_a_winner_is_ranked_and_one_that_is_no_candidate_counts_as_dropped(tmp_path: Path) -> None:
    ranked = predict.best_of_each_key(tune_plan.prune_space(PROBLEM).kept, PROBLEM, 1024)
    path = tmp_path / "E=128,N=768,device_name=AMD_Instinct_MI300X.json"
    first, third = (
        TileConfig(it.block_m, it.block_n, it.block_k, it.group_m, it.num_warps, 2) for it in (ranked[0], ranked[2])
    )
    judged = []
    for shipped in (first, third, ODD):
        path.write_text(config_table.to_json({1024: shipped}))
        judged += benchmark.judge(path, PROBLEM)
    assert [entry.rank for entry in judged] == [0, 2, None]
    assert judged[0].loss == 0 < judged[1].loss
    assert "| 3 | 67% |" in (row := benchmark.summary("all", judged)) and row.endswith("| 1 |")
