"""Many GPUs that are tables: who does which task, what a lost one costs, how a run ends, and which GPUs may join."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_moe_ext.core import (
    CompileJob,
    CompileKey,
    Failure,
    GpuError,
    MoEExtError,
    MoEShape,
    Resources,
    Target,
    TileConfig,
)
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchGemm,
    BenchLayers,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
    GemmTimes,
    LayerTimes,
)
from sglang_moe_ext.tuning.run.executor import Executor, LocalExecutor, close_all, run_tasks, visible_gpus
from tests.examples import examples

REPO_ROOT = Path(__file__).resolve().parents[3]
SHAPE = MoEShape(8, 64, 64, 2)
KEYS = [CompileKey(block_m, block_n, 64, 4, 3) for block_m in (16, 64) for block_n in (32, 64, 128, 256)]
GROUPS = (1, 16)
TOKENS = (4096, 1024, 256, 64, 16, 4, 1)
H100, L4 = "NVIDIA H100 80GB HBM3", "NVIDIA L4"
GONE = MoEExtError("the measuring process did not start: RuntimeError: no CUDA")
SOON_S = 10.0


def recorded_needs(job: CompileJob) -> Resources | Failure:
    if job.key.block_n == 256:
        return Failure("OutOfResources", "shared memory")
    return Resources(job.key.block_m * job.key.block_n, 64, 0)


def recorded_us(tokens: int, config: TileConfig) -> float:
    return 1 + (tokens * 7 + config.block_m * 5 + config.block_n * 3 + config.group_m) % 97 / 10


def recorded(request: BenchRequest) -> BenchResult:
    match request:
        case BenchGemm(tokens, _, key, groups, samples):
            return GemmTimes(tuple((recorded_us(tokens, config_of(key, group)),) * samples for group in groups))
        case BenchLayers(tokens, pairs, rounds):
            us = (sum(recorded_us(tokens, config) for config in pair.values()) for pair in pairs)
            return LayerTimes(tuple((of_pair,) * rounds for of_pair in us), routings=1)
        case CheckAccuracy():
            return Accuracy(1e-3)


def config_of(key: CompileKey, group: int) -> TileConfig:
    return TileConfig(key.block_m, key.block_n, key.block_k, group, key.num_warps, key.num_stages)


class RecordedCompilePool:
    def want(self, jobs: Iterable[CompileJob], first: bool = False) -> None:
        self.wanted = set(jobs)

    def result(self, job: CompileJob) -> Resources | Failure:
        assert job in self.wanted
        return recorded_needs(job)

    def close(self) -> None:
        pass


@dataclass
class RecordedWorker:
    """Results from the record; before its nth result it can die for good."""

    answers_left: int | None = None
    seconds: float = 0.0
    device_name: str = H100
    asked: list[BenchRequest] = field(default_factory=list)
    is_closed: bool = False

    def measure(self, request: BenchRequest) -> BenchResult:
        if self.answers_left is not None and len(self.asked) >= self.answers_left:
            raise GONE
        time.sleep(self.seconds)
        self.asked.append(request)
        return recorded(request)

    def close(self) -> None:
        self.is_closed = True


def executor(name: str = "GPU 0", worker: RecordedWorker | None = None) -> LocalExecutor:
    return LocalExecutor(name, RecordedCompilePool(), worker or RecordedWorker())


def best(tokens: int, here: Executor) -> tuple[TileConfig, float]:
    """A strategy in small: compile, screen what fits, race the best two, check the winner."""
    jobs = {key: CompileJob(SHAPE, "up", tokens, key, Target(90)) for key in KEYS}
    here.want(jobs.values())
    times = {}
    for key, job in jobs.items():
        if isinstance(here.binary(job), Resources):
            result = here.measure(BenchGemm(tokens, "up", key, GROUPS, samples=2))
            assert isinstance(result, GemmTimes)
            times |= {config_of(key, group): min(us) for group, us in zip(GROUPS, result.us, strict=True)}
    finalists = sorted(times, key=lambda config: (times[config], config))[:2]
    raced = here.measure(BenchLayers(tokens, tuple({"up": config, "down": config} for config in finalists), rounds=3))
    assert isinstance(raced, LayerTimes)
    us, winner = min((us[0], config) for us, config in zip(raced.us, finalists, strict=True))
    assert here.measure(CheckAccuracy(tokens, {"up": winner, "down": winner})) == Accuracy(1e-3)
    return winner, us


TASKS: list[Callable[[Executor], tuple[TileConfig, float]]] = [functools.partial(best, tokens) for tokens in TOKENS]


def unseen(done: int, of: int) -> None:
    pass


@functools.cache
def alone() -> list[tuple[TileConfig, float]]:
    """What one executor finds."""
    return run_tasks([executor()], TASKS, unseen)


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Holds a request back until the test ends, at the latest."""
    event = threading.Event()
    yield event
    event.set()


def named(count: int) -> list[LocalExecutor]:
    return [executor(f"GPU {place}") for place in range(count)]


@pytest.mark.parametrize("count", [2, 3, 12])
def test_the_result_does_not_depend_on_the_number_of_executors(count: int) -> None:
    assert run_tasks(named(count), TASKS, unseen) == alone()


@given(lives=st.lists(st.integers(0, 60), max_size=3))
@settings(max_examples=examples(25))
def test_the_result_does_not_depend_on_which_executors_die_or_when(lives: list[int]) -> None:
    mortal = [executor(f"GPU {place}", RecordedWorker(life)) for place, life in enumerate(lives, 1)]
    assert run_tasks([executor(), *mortal], TASKS, unseen) == alone()


def test_a_task_of_a_lost_executor_is_done_by_one_that_had_nothing_left_to_do(released: threading.Event) -> None:
    def waits_then_asks(here: Executor) -> str:
        if here.name == "mortal":
            released.wait(SOON_S)
        here.measure(CheckAccuracy(1, {}))
        return here.name

    def frees_the_other(here: Executor) -> str:
        threading.Timer(0.1, released.set).start()
        return here.name

    mortal = executor("mortal", RecordedWorker(answers_left=0))
    tasks = [waits_then_asks, frees_the_other, frees_the_other]
    assert run_tasks([mortal, executor("other")], tasks, unseen) == ["other"] * 3


def test_when_no_executor_is_left_its_error_is_raised() -> None:
    mortal = [executor(f"GPU {place}", RecordedWorker(answers_left=3)) for place in range(3)]
    with pytest.raises(MoEExtError) as raised:
        run_tasks(mortal, TASKS, unseen)
    assert raised.value is GONE


def test_one_executor_that_dies_raises_its_error() -> None:
    with pytest.raises(MoEExtError) as raised:
        run_tasks([executor(worker=RecordedWorker(answers_left=3))], TASKS, unseen)
    assert raised.value is GONE


def test_a_task_that_hides_the_death_of_its_executor_is_done_again_elsewhere() -> None:
    def hides(here: Executor) -> bool:
        try:
            return here.measure(CheckAccuracy(1, {})) == Accuracy(1e-3)
        except MoEExtError:
            return False

    mortal = [executor(f"GPU {place}", RecordedWorker(answers_left=0)) for place in range(2)]
    assert run_tasks([*mortal, executor("GPU 2")], [hides] * 5, unseen) == [True] * 5


@pytest.mark.parametrize("error", [MoEExtError("nothing ran right"), ZeroDivisionError()], ids=["ours", "a bug"])
def test_an_error_of_the_task_itself_is_raised_and_given_to_nobody_else(error: Exception) -> None:
    tried: list[str] = []

    def fails(here: Executor) -> None:
        tried.append(here.name)
        raise error

    with pytest.raises(type(error)):
        run_tasks(named(3), [fails], unseen)
    assert len(tried) == 1


def test_no_executor_at_all_is_an_error() -> None:
    with pytest.raises(MoEExtError, match="no GPU"):
        run_tasks([], TASKS, unseen)


@pytest.mark.parametrize("count", [1, 3])
def test_no_task_needs_nothing(count: int) -> None:
    assert run_tasks(named(count), [], unseen) == []


@pytest.mark.parametrize("count", [1, 3])
def test_progress_counts_every_task_in_the_callers_thread(count: int) -> None:
    seen: list[tuple[int, int, bool]] = []
    run_tasks(
        named(count),
        TASKS,
        lambda done, of: seen.append((done, of, threading.current_thread() is threading.main_thread())),
    )
    assert seen == [(done, len(TASKS), True) for done in range(len(TASKS) + 1)]


def test_tasks_are_begun_in_their_order() -> None:
    begun: list[int] = []

    def task(place: int, here: Executor) -> None:
        begun.append(place)
        time.sleep(0.002)

    run_tasks(named(2), [functools.partial(task, place) for place in range(20)], unseen)
    assert all(abs(place - turn) <= 1 for turn, place in enumerate(begun))


def test_executors_work_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=SOON_S)

    def task(here: Executor) -> str:
        together.wait()
        return here.name

    assert sorted(run_tasks(named(3), [task] * 3, unseen)) == ["GPU 0", "GPU 1", "GPU 2"]


def test_one_executor_works_in_the_callers_thread() -> None:
    assert run_tasks([executor()], [lambda here: threading.current_thread()], unseen) == [threading.main_thread()]


def interrupt(done: int, of: int) -> None:
    if done:
        raise KeyboardInterrupt


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """A shell starts what runs in its background deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_no_question(released: threading.Event, heeds_ctrl_c: None) -> None:
    main = threading.main_thread().ident
    assert main is not None
    began = time.monotonic()
    threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run_tasks(named(2), [lambda here: released.wait(60)] * 2, unseen)
    assert time.monotonic() - began < SOON_S


_BUSY_FOR_EVER = """
import threading
from sglang_moe_ext.tuning.run import executor
from tests.tuning.run.test_executor import interrupt, named
executor.run_tasks(named(2), [lambda here: None, lambda here: threading.Event().wait()], interrupt)
"""


def test_after_ctrl_c_the_program_ends_though_a_gpu_is_busy_for_ever() -> None:
    command = [sys.executable, "-c", _BUSY_FOR_EVER]
    ended = subprocess.run(command, cwd=REPO_ROOT, stderr=subprocess.PIPE, timeout=60, check=False)
    assert ended.stderr.endswith(b"KeyboardInterrupt\n")


def test_after_ctrl_c_a_task_asks_nothing_more(released: threading.Event) -> None:
    ended = threading.Event()
    worker = RecordedWorker()

    def task(here: Executor) -> None:
        try:
            released.wait(SOON_S)
            here.measure(CheckAccuracy(1, {}))
        finally:
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        run_tasks([executor("GPU 0", worker), executor("GPU 1", worker)], [lambda here: None, task], interrupt)
    released.set()
    assert ended.wait(SOON_S)
    assert worker.asked == []


def test_what_a_gpu_answers_after_ctrl_c_reaches_no_journal(released: threading.Event) -> None:
    """Closing a measuring process looks to its request like a crash of the candidate."""
    journal: list[BenchResult] = []
    ended = threading.Event()

    class Closing(RecordedWorker):
        def measure(self, request: BenchRequest) -> BenchResult:
            released.wait(SOON_S)
            return Failure("Crash", "the measuring process died with exit code -9")

    def task(here: Executor) -> None:
        try:
            journal.append(here.measure(CheckAccuracy(1, {})))
        finally:
            ended.set()

    executors = [executor("GPU 0", Closing()), executor("GPU 1", Closing())]
    with pytest.raises(KeyboardInterrupt):
        run_tasks(executors, [lambda here: None, task], interrupt)
    released.set()
    assert ended.wait(SOON_S)
    assert journal == []


def test_all_executors_are_closed_even_where_one_cannot_be() -> None:
    class Stuck(RecordedWorker):
        def close(self) -> None:
            raise OSError("stuck")

    worker = RecordedWorker()
    with pytest.raises(OSError, match="stuck"):
        close_all([executor("GPU 0", Stuck()), executor("GPU 1", worker)])
    assert worker.is_closed


@pytest.mark.parametrize(
    ("wanted", "set_already", "expected"),
    [
        (None, None, ["0"]),
        ("all", None, ["0", "1", "2"]),
        ("0,2", None, ["0", "2"]),
        (" 2 , 0 ", None, ["2", "0"]),
        (None, "5,7,3", ["5"]),
        ("all", "5,7,3", ["5", "7", "3"]),
        ("1", "5, 7, 3", ["7"]),
        ("2", "GPU-aa,GPU-bb,MIG-cc", ["MIG-cc"]),
        ("all", "5,7,3,-1,4", ["5", "7", "3"]),
    ],
)
def test_an_index_counts_what_this_process_sees(
    wanted: str | None, set_already: str | None, expected: list[str]
) -> None:
    environment = {} if set_already is None else {"CUDA_VISIBLE_DEVICES": set_already}
    assert visible_gpus(wanted, H100, [H100] * 3, environment) == expected


@pytest.mark.parametrize(
    ("wanted", "names", "says"),
    [
        ("", [H100], "makes no sense"),
        ("0,", [H100], "makes no sense"),
        ("0-2", [H100] * 3, "makes no sense"),
        ("-1", [H100], "makes no sense"),
        ("²", [H100] * 3, "makes no sense"),
        ("9" * 5000, [H100], "makes no sense"),
        ("ALL", [H100], "expected all, or indices as in 0,2"),
        ("0,1,0", [H100] * 2, "names a GPU twice"),
        ("0,00", [H100] * 2, "names a GPU twice"),
        ("0,3", [H100] * 3, "GPU 3 is not visible here: expected all, or indices below 3"),
        ("all", [H100, L4, H100], f"GPU 1 is {L4}: expected {H100}.*give --gpus 0,2"),
        ("1", [H100, L4], f"GPU 1 is {L4}: expected {H100}.*give --gpus 0"),
        (None, [L4, H100], f"GPU 0 is {L4}: expected {H100}.*give --gpus 1"),
        ("all", [L4], "give another --gpu"),
        ("all", [], "no GPU is visible here"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_refused_by_name(wanted: str | None, names: Sequence[str], says: str) -> None:
    with pytest.raises(GpuError, match=says):
        visible_gpus(wanted, H100, names, {})


def test_an_empty_list_of_visible_gpus_is_named() -> None:
    with pytest.raises(GpuError, match="CUDA_VISIBLE_DEVICES is ''"):
        visible_gpus("all", H100, [], {"CUDA_VISIBLE_DEVICES": ""})


@given(st.text(alphabet="0123456789,al -", max_size=8))
def test_any_text_is_answered_with_gpus_or_a_gpu_error(wanted: str) -> None:
    try:
        gpus = visible_gpus(wanted, H100, [H100] * 4, {})
    except GpuError:
        return
    assert set(gpus) <= {"0", "1", "2", "3"}
