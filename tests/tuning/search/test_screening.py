"""What is timed at one M, and what comes to the final comparison, on a GPU that is a table."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext.core import CompileKey, Failure, Projection, TileConfig
from sglang_moe_ext.tuning.bench.messages import BenchGemm, BenchRequest, BenchResult, GemmTimes
from sglang_moe_ext.tuning.search import screening
from sglang_moe_ext.tuning.search.screening import Effort, Screening

EFFORT = Effort(keys=None, grouped=2, finalists=4, rounds=8)
GROUPS = (1, 16, 32)
KEYS = [CompileKey(block_m, block_n, 64, 4, 3) for block_m in (16, 64) for block_n in (32, 64, 128)]


def with_groups(keys: list[CompileKey]) -> list[TileConfig]:
    return [key.with_group(group) for key in keys for group in GROUPS]


def both(keys: list[CompileKey]) -> dict[Projection, list[TileConfig]]:
    return {"up": with_groups(keys), "down": with_groups(keys)}


@dataclass(slots=True)
class TableGpu:
    """Each configuration takes so many microseconds, those that the table lacks 100."""

    us: dict[TileConfig, float] = field(default_factory=dict)
    fails: frozenset[CompileKey] = frozenset()
    asked: list[BenchGemm] = field(default_factory=list)

    def __call__(self, request: BenchRequest) -> BenchResult:
        assert isinstance(request, BenchGemm)
        self.asked.append(request)
        if request.key in self.fails:
            return Failure("OutOfResources", "shared memory")
        times = [self.us.get(request.key.with_group(group), 100.0) for group in request.groups]
        return GemmTimes(tuple((us,) * request.samples for us in times))


def nothing_known(projection: Projection, key: CompileKey) -> None:
    return None


def screened(gpu: TableGpu, keys: list[CompileKey] = KEYS, effort: Effort = EFFORT) -> Screening:
    return screening.screen(64, both(keys), effort, gpu, nothing_known)


def test_every_binary_of_each_gemm_is_timed() -> None:
    gpu = TableGpu()
    screened(gpu)
    assert {(one.projection, one.key) for one in gpu.asked} == {(of, key) for of in ("up", "down") for key in KEYS}


def test_the_first_screen_of_a_binary_is_with_the_group_that_is_the_best_guess() -> None:
    gpu = TableGpu()
    screened(gpu)
    assert {one.groups for one in gpu.asked[: 2 * len(KEYS)]} == {GROUPS[:1]}


def test_the_gemms_take_turns_so_that_an_early_end_finds_both_timed() -> None:
    gpu = TableGpu()
    screened(gpu)
    assert [(one.projection, one.key) for one in gpu.asked[:4]] == [
        ("up", KEYS[0]),
        ("down", KEYS[0]),
        ("up", KEYS[1]),
        ("down", KEYS[1]),
    ]


def test_the_fastest_binaries_are_timed_with_every_group() -> None:
    gpu = TableGpu({KEYS[2].with_group(1): 5, KEYS[4].with_group(1): 6})
    screened(gpu)
    assert [one.key for one in gpu.asked if one.groups == GROUPS and one.projection == "up"] == [KEYS[2], KEYS[4]]


def test_a_group_that_only_the_second_screen_tries_can_be_the_fastest() -> None:
    gpu = TableGpu({KEYS[2].with_group(1): 5, KEYS[2].with_group(32): 4})
    assert min(screened(gpu).times["up"].items(), key=lambda item: item[1]) == (KEYS[2].with_group(32), 4)


def test_what_is_hopeless_is_said_to_the_gpu_before_it_is_timed() -> None:
    gpu = TableGpu({KEYS[0].with_group(1): 10})
    screened(gpu)
    assert [one.limit_us for one in gpu.asked if one.projection == "up"][:3] == [None, 15, 15]


def test_a_binary_with_something_against_it_never_runs() -> None:
    gpu = TableGpu()
    trouble = Failure("CompilationError", "refused")
    screening.screen(64, both(KEYS), EFFORT, gpu, lambda _, key: trouble if key == KEYS[1] else None)
    assert KEYS[1] not in {one.key for one in gpu.asked}


def test_failures_are_counted_by_kind() -> None:
    gpu = TableGpu(fails=frozenset(KEYS[:2]))
    refused = Failure("CompilationError", "refused")
    found = screening.screen(64, both(KEYS), EFFORT, gpu, lambda of, key: refused if key == KEYS[5] else None)
    assert (found.tried, found.failures) == (12, {"OutOfResources": 4, "CompilationError": 2})


def test_when_the_time_is_over_each_gemm_has_one_candidate_timed() -> None:
    gpu = TableGpu()
    found = screening.screen(64, both(KEYS), EFFORT, gpu, nothing_known, lambda: True)
    assert {projection: list(times) for projection, times in found.times.items()} == {
        "up": [KEYS[0].with_group(1)],
        "down": [KEYS[0].with_group(1)],
    }


def test_without_a_budget_it_is_never_over() -> None:
    gpu = TableGpu()
    screened(gpu)
    assert len(gpu.asked) == 2 * (len(KEYS) + EFFORT.grouped)


def times(up: dict[TileConfig, float], down: dict[TileConfig, float]) -> Screening:
    return Screening({"up": up, "down": down}, len(up), {})


SMALL, LARGE = KEYS[0].with_group(1), KEYS[3].with_group(1)


def test_a_pair_shares_one_block_size_m() -> None:
    found = screening.finalists(times({SMALL: 1, LARGE: 10}, {SMALL: 10, LARGE: 2}), 1)
    assert found == [{"up": SMALL, "down": SMALL}]


def test_the_best_sum_comes_first() -> None:
    found = screening.finalists(times({SMALL: 1, LARGE: 5}, {SMALL: 10, LARGE: 2}), 2)
    assert found[0] == {"up": LARGE, "down": LARGE}


def test_one_finalist_shares_no_binary_with_the_first() -> None:
    """Else a binary that is fast because it is wrong would leave nothing that is right."""
    fast = {KEYS[0].with_group(group): 1.0 + group / 100 for group in GROUPS}
    other = KEYS[1].with_group(1)
    found = screening.finalists(times({**fast, other: 9.0}, {**fast, other: 9.0}), 4)
    assert {"up": other, "down": other} in found and found[0]["up"].compile_key == KEYS[0]


WITH_TMA = replace(SMALL, use_tma=True)


@pytest.mark.parametrize("tma_us", [0.1, 3.0], ids=["faster", "slower"])
def test_with_tma_and_without_it_come_to_the_rematch(tma_us: float) -> None:
    up = {SMALL: 1.0, replace(SMALL, group_m=16): 1.5, replace(SMALL, group_m=32): 1.7}
    found = screening.finalists(times(up, {SMALL: 2.0, WITH_TMA: tma_us}), 1)
    assert [pair["down"].use_tma for pair in found] == [False, True]


def test_what_is_hopeless_is_judged_by_its_own_path() -> None:
    """A GEMM with TMA that is twice as fast alone must not end the screening of those without."""
    keys = [KEYS[0], replace(KEYS[0], use_tma=True), KEYS[1]]
    gpu = TableGpu({keys[0].with_group(1): 10, keys[1].with_group(1): 1})
    screened(gpu, keys)
    assert [one.limit_us for one in gpu.asked if one.projection == "down"][:3] == [None, None, 15]


def test_the_fastest_of_each_path_are_timed_with_every_group() -> None:
    keys = [replace(key, use_tma=use_tma) for key in KEYS for use_tma in (False, True)]
    gpu = TableGpu({key.with_group(1): 1.0 if key.use_tma else 2.0 for key in keys})
    screened(gpu, keys)
    grouped = [one.key for one in gpu.asked if one.groups == GROUPS and one.projection == "down"]
    assert [key.use_tma for key in grouped] == [False, False, True, True]


def test_where_nothing_ran_there_is_no_finalist() -> None:
    assert screening.finalists(times({}, {}), 4) == []


configs = st.builds(
    TileConfig,
    block_m=st.sampled_from((16, 64)),
    block_n=st.sampled_from((32, 64, 128)),
    block_k=st.just(64),
    group_m=st.sampled_from(GROUPS),
    num_warps=st.just(4),
    num_stages=st.just(3),
    use_tma=st.booleans(),
)
timed = st.dictionaries(configs, st.floats(1, 1000), max_size=20)


@given(timed, timed, st.integers(2, 8))
def test_finalists_are_pairs_of_what_ran_and_each_comes_once(
    up: dict[TileConfig, float], down: dict[TileConfig, float], count: int
) -> None:
    found = screening.finalists(times(up, down), count)
    assert all(sum(pair["down"].use_tma == use_tma for pair in found) <= count for use_tma in (False, True))
    assert all(pair["up"] in up and pair["down"] in down for pair in found)
    assert all(pair["up"].block_m == pair["down"].block_m for pair in found)
    assert all(pair not in found[:place] for place, pair in enumerate(found))


@given(timed, timed)
def test_the_fastest_pair_of_all_is_a_finalist(up: dict[TileConfig, float], down: dict[TileConfig, float]) -> None:
    sums = [up[a] + down[b] for a in up for b in down if a.block_m == b.block_m]
    found = screening.finalists(times(up, down), 2)
    assert not sums or min(up[pair["up"]] + down[pair["down"]] for pair in found) == min(sums)
