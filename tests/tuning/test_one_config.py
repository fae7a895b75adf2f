"""Where one configuration serves both GEMMs: which binaries are timed again, and what comes to the rematch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext import gpus
from sglang_moe_ext.core import PROJECTIONS, MoEShape, TileConfig
from sglang_moe_ext.tuning import candidates, one_config, plan
from sglang_moe_ext.tuning.search import Screening, Times

CONFIGS = [TileConfig(16 << m, 64, 64, group, 4, 3) for m in range(3) for group in (1, 16, 32)]
times_of_gemm = st.dictionaries(st.sampled_from(CONFIGS), st.floats(1, 1e4))
all_times = st.fixed_dictionaries({"up": times_of_gemm, "down": times_of_gemm})
FAST, SLOW = CONFIGS[0], CONFIGS[3]


def screening(times: Times) -> Screening:
    return Screening(times, 0, {})


@given(all_times, st.integers(1, 6))
def test_a_finalist_ran_in_both_gemms_and_is_the_same_in_both(times: Times, count: int) -> None:
    for pair in one_config.finalists(screening(times), count):
        assert pair["up"] == pair["down"]
        assert all(pair["up"] in times[projection] for projection in PROJECTIONS)


@given(all_times)
def test_the_first_finalist_has_the_smallest_sum_of_times(times: Times) -> None:
    both = {config: us + times["down"][config] for config, us in times["up"].items() if config in times["down"]}
    found = one_config.finalists(screening(times), 1)
    assert [both[pair["up"]] for pair in found] == ([min(both.values())] if both else [])


@given(all_times)
def test_of_one_binary_two_groups_are_finalists_at_most(times: Times) -> None:
    keys = [pair["up"].compile_key for pair in one_config.finalists(screening(times), 9)]
    assert all(keys.count(key) <= 2 for key in keys)


@given(all_times, st.integers(1, 3))
def test_the_same_binaries_of_both_gemms_are_timed_with_every_group(times: Times, count: int) -> None:
    found = one_config.fastest_keys(times, count)
    assert found["up"] == found["down"] and len(found["up"]) <= count


def test_a_slow_down_gemm_makes_a_fast_up_gemm_no_finalist() -> None:
    found = one_config.finalists(screening({"up": {FAST: 1, SLOW: 5}, "down": {FAST: 10, SLOW: 2}}), 1)
    assert found == [{"up": SLOW, "down": SLOW}]


def test_both_gemms_are_screened_with_the_same_candidates() -> None:
    shape, gpu = MoEShape(128, 768, 2048, 8), gpus.find("H200")
    found = candidates.listed_for_both(plan.sifted(shape, gpu).kept, shape, gpu, 64, keys=24)
    assert found["up"] == found["down"]
    assert len({config.compile_key for config in found["up"]}) == 24
