"""Where one configuration serves both GEMMs: which binaries are timed again, and what comes to the final comparison."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext.core import PROJECTIONS, MoEShape, TileConfig
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.tuning import tune_plan
from sglang_moe_ext.tuning.bench.messages import Pair
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.run import search_loop
from sglang_moe_ext.tuning.run.journal import Journal
from sglang_moe_ext.tuning.search import candidates
from sglang_moe_ext.tuning.search import screening as search
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice
from sglang_moe_ext.tuning.search.screening import Screening, Times
from tests.tuning.recorded_runs import MEASURING, TODAY, ReplayingStation, formula, request_of, unseen

CONFIGS = [TileConfig(16 << m, 64, 64, group, 4, 3) for m in range(3) for group in (1, 16, 32)]
times_of_gemm = st.dictionaries(st.sampled_from(CONFIGS), st.floats(1, 1e4))
all_times = st.fixed_dictionaries({"up": times_of_gemm, "down": times_of_gemm})
FAST, SLOW = CONFIGS[0], CONFIGS[3]
TOKENS = (64, 1024)


def screening(times: Times) -> Screening:
    return Screening(times, 0, {})


@given(all_times, st.integers(1, 6))
def test_a_finalist_ran_in_both_gemms_and_is_the_same_in_both(times: Times, count: int) -> None:
    for pair in search.shared_finalists(screening(times), count):
        assert pair["up"] == pair["down"]
        assert all(pair["up"] in times[projection] for projection in PROJECTIONS)


@given(all_times)
def test_the_first_finalist_has_the_smallest_sum_of_times(times: Times) -> None:
    both = {config: us + times["down"][config] for config, us in times["up"].items() if config in times["down"]}
    found = search.shared_finalists(screening(times), 1)
    assert [both[pair["up"]] for pair in found] == ([min(both.values())] if both else [])


@given(all_times)
def test_of_one_binary_two_groups_are_finalists_at_most(times: Times) -> None:
    keys = [pair["up"].compile_key for pair in search.shared_finalists(screening(times), 9)]
    assert all(keys.count(key) <= 2 for key in keys)


@given(all_times, st.integers(1, 3))
def test_the_same_binaries_of_both_gemms_are_timed_with_every_group(times: Times, count: int) -> None:
    found = search.fastest_shared_keys(times, count)
    assert found["up"] == found["down"] and len(found["up"]) <= count


def test_a_slow_down_gemm_makes_a_fast_up_gemm_no_finalist() -> None:
    found = search.shared_finalists(screening({"up": {FAST: 1, SLOW: 5}, "down": {FAST: 10, SLOW: 2}}), 1)
    assert found == [{"up": SLOW, "down": SLOW}]


@functools.cache
def measured() -> dict[int, MeasuredChoice]:
    """What a run for vLLM chooses on a GPU whose results follow from a formula."""
    request = replace(
        request_of("glm_4_7_flash_bf16", TOKENS),
        problem=Problem(MoEShape(64, 1536, 2048, 4), find_gpu("H200"), "vllm"),
    )
    kept = tune_plan.prune_space(request.problem).kept
    tasks = search_loop.largest_first(
        {
            m: candidates.list_for_effort(
                kept, request.problem, m, effort=MEASURING.effort, with_tma=MEASURING.with_tma
            )
            for m in TOKENS
        }
    )
    today: dict[int, Pair] = dict.fromkeys(TOKENS, TODAY)
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal.create(Path(folder, "run.jsonl"), {})
        executor = ReplayingStation(formula)
        return search_loop.measure_all(request, MEASURING, tasks, lambda: today, [executor], journal, unseen).pairs


def test_a_run_for_vllm_chooses_one_configuration_without_tma_for_both_gemms() -> None:
    pairs = [result.pair for result in measured().values()]
    assert len(pairs) == len(TOKENS)
    assert all(pair["up"] == pair["down"] and not pair["up"].use_tma for pair in pairs)


def test_a_run_for_vllm_finds_what_is_faster_than_today() -> None:
    assert all(result.us < result.incumbent_us for result in measured().values())


def test_both_gemms_are_screened_with_the_same_candidates() -> None:
    problem = Problem(MoEShape(128, 768, 2048, 8), find_gpu("H200"), "sglang")
    found = candidates.list_shared_candidates(tune_plan.prune_space(problem).kept, problem, 64, keys=24)
    assert found["up"] == found["down"]
    assert len({config.compile_key for config in found["up"]}) == 24
