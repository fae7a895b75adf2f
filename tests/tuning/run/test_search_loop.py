"""All batch sizes of a layer on GPUs that are formulas, tables or fakes: what is chosen, and what is lost to what."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext.core import CompileJob, CompileKey, Failure, MoEExtError, Projection, Resources
from sglang_moe_ext.kernel_plans import SortedKernelJob, list_jobs
from sglang_moe_ext.tuning.bench.messages import (
    BenchGemm,
    BenchKernelPlan,
    BenchLayers,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
    GemmTimes,
    LayerTimes,
    Pair,
)
from sglang_moe_ext.tuning.bench.routing import UNIFORM
from sglang_moe_ext.tuning.bench.worker import BenchProcess
from sglang_moe_ext.tuning.compile.kernel_source import Job
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.run import journal, search_loop
from sglang_moe_ext.tuning.run.executor import Executor, LocalExecutor
from sglang_moe_ext.tuning.run.journal import Journal
from sglang_moe_ext.tuning.run.search_loop import SearchTask
from sglang_moe_ext.tuning.search import candidates
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice
from tests.tuning.children.keyed_bench import (
    EXITS,
    EXITS_IN_A_LAYER,
    HANGS,
    RAISES,
    SEGFAULTS,
    STICKY,
    WRONG,
    MakeKeyedBench,
)
from tests.tuning.recorded_runs import (
    FITS,
    GPU,
    LAYERS,
    MEASURING,
    TODAY,
    ReplayingStation,
    formula,
    measured,
    request_of,
    unseen,
)

LAYER = "glm_4_7_flash_bf16"
SHAPE = LAYERS[LAYER]
FEW = (16, 64, 1024, 4096)
GONE = MoEExtError("the measuring process did not start: RuntimeError: no CUDA")


def new_journal(folder: Path, name: str = "journal.jsonl") -> Journal:
    return Journal.create(folder / name, {"seed": 0})


def found(run: Journal, *executors: Executor, **changes: object) -> dict[int, MeasuredChoice]:
    measuring = dataclasses.replace(MEASURING, effort="quick", **changes)  # type: ignore[arg-type]
    return measured(LAYER, run, executors, FEW, measuring, dict.fromkeys(FEW, TODAY))


@functools.cache
def alone() -> dict[int, MeasuredChoice]:
    """What one executor finds."""
    with tempfile.TemporaryDirectory() as folder:
        return found(new_journal(Path(folder)), ReplayingStation(formula))


def test_the_largest_batch_comes_first() -> None:
    tasks = search_loop.largest_first({m: {"up": [], "down": []} for m in (64, 1, 4096)})
    assert [task.tokens for task in tasks] == [4096, 64, 1]


@given(st.integers(0, 40))
def test_any_beginning_of_a_spread_run_lies_near_the_rest(count: int) -> None:
    tasks = search_loop.largest_first({1 << exponent: {"up": [], "down": []} for exponent in range(count)})
    places = [tasks.index(task) for task in search_loop.spread(tasks)]
    assert sorted(places) == list(range(count))
    for done in range(2, count):
        taken = sorted(places[:done])
        widest = max(after - before for before, after in itertools.pairwise(taken))
        assert widest * (done - 1) <= 2 * (count - 1) + 2 * (done - 1), (done, taken)


def test_results_come_in_the_order_of_the_batch_sizes(tmp_path: Path) -> None:
    assert tuple(found(new_journal(tmp_path), ReplayingStation(formula))) == FEW


@pytest.mark.parametrize("count", [2, 3, 8])
def test_several_executors_choose_what_one_does(count: int, tmp_path: Path) -> None:
    executors = [ReplayingStation(formula, f"GPU {index}", seconds=0.0005) for index in range(count)]
    assert found(new_journal(tmp_path), *executors) == alone()


def test_several_executors_ask_nothing_twice(tmp_path: Path) -> None:
    executors = [ReplayingStation(formula, f"GPU {index}", seconds=0.0005) for index in range(3)]
    found(new_journal(tmp_path), *executors)
    asked = [repr(request) for executor in executors for request in executor.asked]
    assert len(asked) == len(set(asked))


def test_what_several_executors_wrote_replays_to_what_they_chose(tmp_path: Path) -> None:
    run = new_journal(tmp_path)
    together = found(run, *[ReplayingStation(formula, f"GPU {index}", seconds=0.0005) for index in range(3)])
    run.close()
    assert found(new_journal(tmp_path, "again.jsonl"), ReplayingStation(journal.replay([run.path]))) == together


@dataclass
class DyingStation(ReplayingStation):
    """Results so many requests, and then no more."""

    answers_left: int = 0

    def measure(self, request: BenchRequest) -> BenchResult:
        if self.answers_left <= 0:
            raise GONE
        self.answers_left -= 1
        return super().measure(request)


@pytest.mark.parametrize("results", [0, 1, 37, 150])
def test_a_executor_that_dies_in_the_middle_changes_no_choice(results: int, tmp_path: Path) -> None:
    executors = [
        DyingStation(formula, "GPU 0", answers_left=results),
        ReplayingStation(formula, "GPU 1", seconds=0.001),
    ]
    assert found(new_journal(tmp_path), *executors) == alone()


def test_what_a_lost_executor_had_answered_is_not_asked_again(tmp_path: Path) -> None:
    dying = DyingStation(formula, "GPU 0", answers_left=37)
    other = ReplayingStation(formula, "GPU 1", seconds=0.001)
    found(new_journal(tmp_path), dying, other)
    assert {repr(request) for request in dying.asked}.isdisjoint(map(repr, other.asked))


def test_a_run_whose_last_executor_dies_can_be_gone_on_with(tmp_path: Path) -> None:
    run = new_journal(tmp_path)
    dying = [DyingStation(formula, f"GPU {index}", answers_left=50) for index in range(2)]
    with pytest.raises(MoEExtError, match="did not start"):
        found(run, *dying)
    run.close()
    fresh = ReplayingStation(formula)
    assert found(Journal.open(run.path), fresh) == alone()
    assert {repr(asked) for each in dying for asked in each.asked}.isdisjoint(map(repr, fresh.asked))


@pytest.mark.parametrize("budget_s", [1e-9, 0.05])
def test_a_tiny_budget_gives_every_batch_size_a_choice(budget_s: float, tmp_path: Path) -> None:
    executor = ReplayingStation(formula, seconds=0.0005)
    assert tuple(found(new_journal(tmp_path), executor, budget_s=budget_s)) == FEW


def test_a_tiny_budget_asks_far_fewer_questions(tmp_path: Path) -> None:
    short, long = ReplayingStation(formula), ReplayingStation(formula)
    found(new_journal(tmp_path), short, budget_s=1e-9)
    found(new_journal(tmp_path, "long.jsonl"), long)
    assert len(short.asked) * 10 < len(long.asked)


def test_after_a_deadline_the_batch_sizes_that_were_not_compared_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def slow(request: BenchRequest) -> BenchResult:
        now[0] += isinstance(request, BenchLayers)
        return formula(request)

    monkeypatch.setattr(search_loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    ends = search_loop._FOR_THE_END_S + 0.5
    assert tuple(found(new_journal(tmp_path), ReplayingStation(slow), deadline=ends)) == FEW[-1:]


@pytest.mark.parametrize(("comparisons", "compared"), [(2, (16, 4096)), (3, (16, 1024, 4096)), (4, FEW)])
def test_a_deadline_leaves_batch_sizes_out_between_those_that_were_compared(
    comparisons: int, compared: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, seen = [0.0], set[int]()

    def slow(request: BenchRequest) -> BenchResult:
        if isinstance(request, BenchLayers) and request.tokens not in seen:
            seen.add(request.tokens)
            now[0] += 1.0
        return formula(request)

    monkeypatch.setattr(search_loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    ends = search_loop._FOR_THE_END_S + comparisons - 0.5
    assert tuple(found(new_journal(tmp_path), ReplayingStation(slow), deadline=ends)) == compared


def test_a_deadline_that_leaves_no_comparison_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MoEExtError, match="the deadline came before"):
        found(new_journal(tmp_path), ReplayingStation(formula), deadline=time.monotonic())


def test_incumbents_are_asked_for_when_all_is_screened(tmp_path: Path) -> None:
    executor, asked_before = ReplayingStation(formula), []
    request, tasks = request_of(LAYER, FEW), _tasks([CompileKey(16, 64, 64, 4, 3), CompileKey(16, 128, 64, 4, 3)])

    def incumbents() -> dict[int, Pair]:
        asked_before.extend(executor.asked)
        return dict.fromkeys(FEW, TODAY)

    search_loop.measure_all(request, MEASURING, tasks, incumbents, [executor], new_journal(tmp_path), unseen)
    after = executor.asked[len(asked_before) :]
    assert all(isinstance(request, BenchGemm) for request in asked_before)
    assert all(isinstance(request, BenchLayers | CheckAccuracy) for request in after) and after


def test_no_binary_is_waited_for_that_was_not_wanted(tmp_path: Path) -> None:
    executor = ReplayingStation(formula)
    waited: list[CompileJob] = []
    executor.needs = lambda job: waited.append(job) or FITS  # type: ignore[func-returns-value]
    found(new_journal(tmp_path), executor)
    assert set(waited) <= executor.wanted


def test_screening_progress_comes_to_its_end(tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    executor = ReplayingStation(formula)
    request, tasks = request_of(LAYER, FEW), _tasks([CompileKey(16, 64, 64, 4, 3), CompileKey(16, 128, 64, 4, 3)])
    search_loop.measure_all(
        request,
        MEASURING,
        tasks,
        lambda: dict.fromkeys(FEW, TODAY),
        [executor],
        new_journal(tmp_path),
        lambda *of: said.append(of),
    )
    screened = [(done, of) for stage, done, of in said if stage == "screening"]
    assert screened[-1] == (16, 16) and screened == sorted(screened)


UNFIT = {
    "does not compile": Failure("CompilationError", "refused"),
    "does not fit": Resources(GPU.smem_per_block + 1, 128, 0),
}


@pytest.mark.parametrize("needs", UNFIT.values(), ids=UNFIT.keys())
def test_a_binary_that_cannot_run_is_never_timed(needs: Resources | Failure, tmp_path: Path) -> None:
    executor = ReplayingStation(formula, needs=lambda job: needs if job.key.block_n == 128 else FITS)
    results = found(new_journal(tmp_path), executor)
    assert 128 not in {asked.key.block_n for asked in executor.asked if isinstance(asked, BenchGemm)}
    assert 128 not in {config.block_n for result in results.values() for config in result.pair.values()}


def test_a_pair_whose_own_binary_does_not_compile_is_not_raced(tmp_path: Path) -> None:
    winner = alone()[64].pair
    failing = set(candidates.pair_jobs(winner, Problem(SHAPE, GPU, "sglang"), 64))
    executor = ReplayingStation(formula, needs=lambda job: UNFIT["does not compile"] if job in failing else FITS)
    results = found(new_journal(tmp_path), executor)
    assert results[64].pair not in (winner, TODAY)
    assert not any(
        winner in asked.pairs for asked in executor.asked if isinstance(asked, BenchLayers) and asked.tokens == 64
    )


def test_where_nothing_runs_right_the_error_names_the_gpu(tmp_path: Path) -> None:
    def broken(request: BenchRequest) -> BenchResult:
        return Failure("CudaError", "an illegal memory access was encountered")

    with pytest.raises(MoEExtError, match="nothing ran right on NVIDIA H200"):
        found(new_journal(tmp_path), ReplayingStation(broken))


def test_a_batch_size_where_nothing_runs_costs_itself_alone(tmp_path: Path) -> None:
    def broken_at_64(request: BenchRequest) -> BenchResult:
        return Failure("CudaError", "no") if request.tokens == 64 else formula(request)

    results = found(new_journal(tmp_path), ReplayingStation(broken_at_64))
    assert results == {m: result for m, result in alone().items() if m != 64}


def _tasks(keys: Sequence[CompileKey], tokens: Sequence[int] = FEW) -> list[SearchTask]:
    configs = [key.with_group(group) for key in keys for group in (1, 16)]
    return search_loop.largest_first({m: {"up": configs, "down": configs} for m in tokens})


FINE_KEYS = [CompileKey(16, block_n, 64, warps, 3) for block_n in (32, 64, 128) for warps in (4, 8)]


class FittingCompilePool:
    def want(self, jobs: object, *, first: bool = False) -> None:
        pass

    def result(self, job: CompileJob) -> Resources:
        return FITS

    def close(self) -> None:
        pass


@dataclass
class Isolated:
    """A run in real measuring processes, of keys with something wrong with them among others."""

    folder: Path
    run: Journal = field(init=False)

    def __post_init__(self) -> None:
        self.run = new_journal(self.folder)

    def found(self, *num_stages: int, gpus: int = 1, tokens: Sequence[int] = (64,)) -> dict[int, MeasuredChoice]:
        bad = [CompileKey(16, 64, 128, 4, stages) for stages in num_stages]
        keys = [*FINE_KEYS[:3], *bad, *FINE_KEYS[3:]]
        make = MakeKeyedBench(SHAPE, UNIFORM, 0, self.folder)
        executors = [
            LocalExecutor(
                f"GPU {index}",
                FittingCompilePool(),
                BenchProcess(make, {"CUDA_VISIBLE_DEVICES": str(index)}, timeout_s=3),
            )
            for index in range(gpus)
        ]
        try:
            return search_loop.measure_all(
                request_of(LAYER, tokens),
                MEASURING,
                _tasks(keys, tokens),
                lambda: dict.fromkeys(tokens, TODAY),
                executors,
                self.run,
                unseen,
            ).pairs
        finally:
            for executor in executors:
                executor.close()

    def screened(self) -> set[tuple[Projection, CompileKey]]:
        """What was timed without a failure."""
        known = self.run.known()
        return {
            (asked.projection, asked.key)
            for asked, result in known
            if isinstance(asked, BenchGemm) and not isinstance(result, Failure)
        }

    def starts(self) -> int:
        return len((self.folder / "starts").read_text().splitlines())


@pytest.fixture(scope="module")
def isolated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Isolated, MeasuredChoice]:
    one = Isolated(tmp_path_factory.mktemp("isolated"))
    return one, one.found(HANGS, EXITS, SEGFAULTS, STICKY, RAISES)[64]


def test_a_search_over_candidates_that_break_the_gpu_ends_with_a_choice(
    isolated: tuple[Isolated, MeasuredChoice],
) -> None:
    assert {config.compile_key for config in isolated[1].pair.values()} <= set(FINE_KEYS)


def test_what_broke_the_gpu_is_counted_by_kind(isolated: tuple[Isolated, MeasuredChoice]) -> None:
    assert isolated[1].failures == {"Timeout": 2, "Crash": 4, "CudaError": 2, "ValueError": 2}


def test_every_candidate_that_breaks_nothing_is_timed(isolated: tuple[Isolated, MeasuredChoice]) -> None:
    assert isolated[0].screened() == {(projection, key) for projection in ("up", "down") for key in FINE_KEYS}


def test_each_break_costs_one_start_of_the_process_and_an_error_none(isolated: tuple[Isolated, MeasuredChoice]) -> None:
    assert isolated[0].starts() == 1 + 2 * len((HANGS, EXITS, SEGFAULTS, STICKY))


def test_what_broke_the_gpu_does_not_do_so_again_when_the_run_is_gone_on_with(
    isolated: tuple[Isolated, MeasuredChoice], tmp_path: Path
) -> None:
    again = Isolated(tmp_path)
    again.run = Journal.open(isolated[0].run.path)
    assert again.found(HANGS, EXITS, SEGFAULTS, STICKY, RAISES)[64] == isolated[1]


def test_the_choice_is_what_it_were_without_those_that_break(
    isolated: tuple[Isolated, MeasuredChoice], tmp_path: Path
) -> None:
    without = Isolated(tmp_path).found()[64]
    assert (without.pair, without.us) == (isolated[1].pair, isolated[1].us)


@pytest.mark.parametrize("num_stages", [EXITS_IN_A_LAYER, WRONG], ids=["ends the process in a layer", "is wrong"])
def test_the_fastest_pair_is_not_chosen_where_it(num_stages: int, tmp_path: Path) -> None:
    one = Isolated(tmp_path)
    chosen = one.found(num_stages)[64].pair
    raced = [pair for asked, _ in one.run.known() if isinstance(asked, BenchLayers) for pair in asked.pairs]
    assert num_stages in {config.num_stages for pair in raced for config in pair.values()}
    assert num_stages not in {config.num_stages for config in chosen.values()}


def test_processes_that_break_on_two_gpus_change_no_choice(
    isolated: tuple[Isolated, MeasuredChoice], tmp_path: Path
) -> None:
    results = Isolated(tmp_path).found(EXITS, STICKY, gpus=2, tokens=(64, 128))
    assert results[64].pair == isolated[1].pair
    assert [result.failures for result in results.values()] == [{"Crash": 2, "CudaError": 2}] * 2


def test_a_pool_that_can_compile_nothing_ends_the_run_and_says_why(tmp_path: Path) -> None:
    """Else each M would keep its incumbent, as if it had been measured."""
    executor = ReplayingStation(formula)
    executor.needs = lambda job: Failure("CompilePoolUnable", "sglang.srt cannot be imported")
    with pytest.raises(MoEExtError, match=r"nothing can be compiled: sglang\.srt cannot be imported"):
        found(new_journal(tmp_path), executor)


def test_where_every_candidate_fails_nothing_is_said_of_the_incumbent(tmp_path: Path) -> None:
    executor = ReplayingStation(formula)
    executor.needs = lambda job: Failure("CompilationError", "refused")
    with pytest.raises(MoEExtError, match=r"nothing ran right on NVIDIA H200 .*CompilationError"):
        found(new_journal(tmp_path), executor)


def with_plans(request: BenchRequest) -> BenchResult:
    """A GPU on which every plan of our own kernels is as fast as the next."""
    match request:
        case BenchKernelPlan():
            return GemmTimes(((1.0,) * request.samples,))
        case BenchLayers(_, pairs, rounds):
            return LayerTimes(((1.0,) * rounds,) * len(pairs), routings=1)
    return formula(request)


def test_binaries_of_our_own_kernels_are_made_by_the_pool_before_they_are_timed(tmp_path: Path) -> None:
    made: list[object] = []

    def needs(job: Job) -> Resources | Failure:
        made.append(job)
        return Resources(smem_bytes=65536, registers=128, spill_bytes=0)

    executor = ReplayingStation(with_plans, needs=needs)
    found(new_journal(tmp_path), executor, with_own_kernels=True)
    timed = [request for request in executor.asked if isinstance(request, BenchKernelPlan)]
    needed = {job for request in timed for job in list_jobs(request.plan, SHAPE, request.tokens, GPU.sm)}
    assert timed and needed <= executor.wanted and needed <= set(made)


def test_our_own_kernels_are_compared_when_all_batch_sizes_have_a_pair(tmp_path: Path) -> None:
    executor = ReplayingStation(with_plans)
    chosen = found(new_journal(tmp_path), executor, with_own_kernels=True)
    begin = next(at for at, request in enumerate(executor.asked) if isinstance(request, BenchKernelPlan))
    compared = {request.tokens for request in executor.asked[:begin] if isinstance(request, BenchLayers)}
    assert compared == set(chosen) == set(FEW)


@pytest.mark.parametrize("deadline", [None, 1e9])
def test_a_budget_is_not_overrun_for_our_own_kernels(deadline: float | None, tmp_path: Path) -> None:
    executor = ReplayingStation(with_plans)
    found(new_journal(tmp_path), executor, with_own_kernels=True, budget_s=1e-9, deadline=deadline)
    assert not [request for request in executor.asked if isinstance(request, BenchKernelPlan)]


def test_one_of_our_own_kernels_that_does_not_fit_is_not_timed(tmp_path: Path) -> None:
    def needs(job: Job) -> Resources | Failure:
        smem_bytes = 300_000 if isinstance(job, SortedKernelJob) else 65536
        return Resources(smem_bytes, registers=128, spill_bytes=0)

    executor = ReplayingStation(with_plans, needs=needs)
    found(new_journal(tmp_path), executor, with_own_kernels=True)
    assert not [request for request in executor.asked if isinstance(request, BenchKernelPlan)]
