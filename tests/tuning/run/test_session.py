"""A whole measuring run: opened under its circumstances, killed at any moment and gone on with, on real processes."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_moe_ext.core import EngineError, MoEExtError, StoreError
from sglang_moe_ext.engines.sglang import installation
from sglang_moe_ext.tuning import tune_plan
from sglang_moe_ext.tuning.bench.messages import BenchGemm
from sglang_moe_ext.tuning.bench.routing import UNIFORM
from sglang_moe_ext.tuning.bench.worker import BenchProcess
from sglang_moe_ext.tuning.compile.kernel_source import KernelSource
from sglang_moe_ext.tuning.request import MeasureOptions, TuneRequest
from sglang_moe_ext.tuning.run import session
from sglang_moe_ext.tuning.run.journal import Journal
from sglang_moe_ext.tuning.run.run_folder import RunFolder
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice
from tests.tuning.children.keyed_bench import MakeKeyedBench
from tests.tuning.recorded_runs import MEASURING, TODAY, ReplayingStation, formula, measured, request_of, unseen

REPO_ROOT = Path(__file__).resolve().parents[3]
CHILD = Path(__file__).parents[1] / "children" / "measuring.py"
LAYER = "glm_4_7_flash_bf16"
REQUEST = request_of(LAYER)
FEW = (64, 1024)
KILLS = 6
SOURCE = KernelSource("a kernel of the tests", "tests.tuning.children.any_kernel", "1", is_engines_own=False)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of its own."""
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@dataclasses.dataclass(frozen=True)
class Killed:
    """A run that was killed and gone on with until it was through."""

    said: str
    asked: list[str]
    asked_by_each_kill: list[int]
    store: Path


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    asked, dice = tmp_path_factory.mktemp("killed") / "asked", random.Random(0)
    asked_by: list[int] = []
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT), "SGLANG_MOE_EXT_STORE": str(asked.parent / "store")}
    while True:
        # The last one need not be slow: nobody kills it.
        seconds = "0.001" if len(asked_by) < KILLS else "0"
        child = subprocess.Popen(
            [sys.executable, str(CHILD), LAYER, str(asked), seconds, *map(str, FEW)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == "ready\n", child.stderr.read()
        if len(asked_by) < KILLS:
            before = asked.read_bytes().count(b"\n")
            wait_for = before + dice.randrange(1, 60)
            while asked.read_bytes().count(b"\n") < wait_for and child.poll() is None:
                time.sleep(dice.uniform(0, 0.004))
            child.kill()
        said, errors = child.communicate(timeout=60)
        if child.returncode == 0:
            lines = asked.read_text().splitlines()
            return Killed(said.splitlines()[-1], lines, asked_by, asked.parent / "store" / "runs")
        assert child.returncode == -signal.SIGKILL, errors
        asked_by.append(asked.read_bytes().count(b"\n"))


def uninterrupted(folder: Path) -> tuple[dict[int, MeasuredChoice], ReplayingStation]:
    executor, journal = ReplayingStation(formula), Journal.create(folder / "straight.jsonl", {})
    return measured(LAYER, journal, [executor], FEW, today=dict.fromkeys(FEW, TODAY)), executor


def test_the_kills_come_while_questions_are_asked(killed: Killed) -> None:
    assert len(set(killed.asked_by_each_kill) - {0}) == KILLS


def test_each_kill_costs_one_question_at_most(killed: Killed) -> None:
    again = len(killed.asked) - len(set(killed.asked))
    assert again <= KILLS and max(Counter(killed.asked).values()) <= 1 + KILLS


def test_a_run_that_was_killed_ends_as_one_that_was_not(killed: Killed, tmp_path: Path) -> None:
    results, _ = uninterrupted(tmp_path)
    assert killed.said == repr(results)


def test_a_run_that_was_killed_asks_nothing_that_one_that_was_not_would_not(killed: Killed, tmp_path: Path) -> None:
    _, executor = uninterrupted(tmp_path)
    assert set(killed.asked) == {repr(request) for request in executor.asked}


def test_a_run_that_was_killed_stays_one_run(killed: Killed) -> None:
    assert len(list(killed.store.iterdir())) == 1


def opened(request: TuneRequest = REQUEST, resume: bool | Path = False, **changes: object) -> RunFolder:
    measuring = dataclasses.replace(MEASURING, resume=resume, **changes)  # type: ignore[arg-type]
    return session.open_run(request, measuring, SOURCE)


def test_a_run_is_new_where_nobody_asks_to_resume() -> None:
    with opened() as first, opened() as second:
        assert first.folder != second.folder


@pytest.mark.parametrize("by_folder", [False, True])
def test_a_run_is_gone_on_with_under_the_same_circumstances(by_folder: bool) -> None:
    with opened() as first:
        pass
    with opened(resume=first.folder if by_folder else True) as second:
        assert second.folder == first.folder


def test_effort_budget_and_gpus_may_change_when_a_run_is_gone_on_with() -> None:
    with opened() as first:
        pass
    with opened(request_of(LAYER, (8,)), resume=True, effort="quick", budget_s=5.0, gpus=("1", "2")) as second:
        assert second.folder == first.folder


REQUEST = request_of(LAYER)
ELSEWHERE = dataclasses.replace(REQUEST.problem, shape=dataclasses.replace(REQUEST.shape, ep=2))
OTHERS = {
    "seed": lambda: opened(dataclasses.replace(request_of(LAYER), seed=1), resume=True),
    "layer": lambda: opened(request_of("qwen3_30b_a3b_fp8_block"), resume=True),
    "routing": lambda: opened(resume=True, routing=UNIFORM),
    "expert parallelism": lambda: opened(dataclasses.replace(request_of(LAYER), problem=ELSEWHERE), resume=True),
    "kernel": lambda: session.open_run(
        request_of(LAYER), dataclasses.replace(MEASURING, resume=True), dataclasses.replace(SOURCE, fingerprint="2")
    ),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_a_run_of_another_circumstance_is_not_gone_on_with(other: object) -> None:
    with opened():
        pass
    with pytest.raises(StoreError, match="no unfinished run"):
        other()  # type: ignore[operator]


def test_a_named_run_of_another_seed_is_refused_with_both_seeds() -> None:
    with opened() as first:
        pass
    with pytest.raises(StoreError, match="seed is 0 there and 1 now"):
        opened(dataclasses.replace(request_of(LAYER), seed=1), resume=first.folder)


def today_of(tokens: Sequence[int]) -> Any:
    """What the engine runs today, without an engine."""
    return SimpleNamespace(**{of: dict.fromkeys(tokens, config) for of, config in TODAY.items()})


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A pool and measuring processes that are real, of a kernel and a bench that are not."""
    monkeypatch.setattr(session, "BenchSetup", MakeKeyedBench)
    monkeypatch.setattr(session, "default_path", lambda: tmp_path / "compiled")
    monkeypatch.setenv("PYTHONPATH", str(REPO_ROOT))


def results(run: RunFolder, gpus: tuple[str, ...] = ("0",)) -> dict[int, MeasuredChoice]:
    measuring: MeasureOptions = dataclasses.replace(MEASURING, effort="quick", gpus=gpus)
    request = request_of(LAYER, FEW, measuring)
    kept = tune_plan.prune_space(request.problem).kept
    return session.measure(request, measuring, run, kept, lambda: today_of(request.tokens), SOURCE, unseen).pairs


def starts(run: RunFolder) -> list[str]:
    return (run.triton_cache / "starts").read_text().splitlines()


@pytest.mark.usefixtures("processes")
def test_two_gpus_of_this_machine_choose_what_one_does() -> None:
    with opened() as one, opened() as two:
        assert results(one, ("5",)) == results(two, ("5", "7"))
        assert (starts(one), sorted(starts(two))) == (["5"], ["5", "7"])


@pytest.mark.usefixtures("processes")
def test_what_does_not_compile_is_neither_timed_nor_chosen() -> None:
    with opened() as run:
        found = results(run)
        timed = {asked.key.block_n for asked, _ in run.journal.known() if isinstance(asked, BenchGemm)}
    assert 256 not in timed
    assert 256 not in {config.block_n for result in found.values() for config in result.pair.values()}
    assert all(result.failures["CompilationError"] > 0 for result in found.values())


def workers_of(monkeypatch: pytest.MonkeyPatch) -> list[BenchProcess]:
    """All that the run starts from now on."""
    made: list[BenchProcess] = []

    def start(*given: Any) -> BenchProcess:
        made.append(BenchProcess(*given))
        return made[-1]

    monkeypatch.setattr(session, "BenchProcess", start)
    return made


@pytest.mark.usefixtures("processes")
def test_the_measuring_processes_end_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made = workers_of(monkeypatch)
    with opened() as run:
        results(run, ("0", "1"))
    assert [worker._process.is_alive() for worker in made] == [False, False]


@pytest.mark.usefixtures("processes")
def test_the_measuring_processes_end_when_the_engine_gives_no_incumbents(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(answer: object) -> None:
        raise MoEExtError("the engine does not answer")

    made = workers_of(monkeypatch)
    monkeypatch.setattr(session, "pairs_of", refused)
    with opened() as run, pytest.raises(MoEExtError, match="does not answer"):
        results(run)
    assert [worker._process.is_alive() for worker in made] == [False]


def test_a_node_with_another_kernel_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "find", lambda: None)
    other = KernelSource("SGLang 0.5.15's own kernel", "sglang_moe_ext.kernels.fused_moe_compile", "another", True)
    make = session._OnNode(other, REQUEST, MEASURING)
    with pytest.raises(EngineError, match=r"it has our own kernel.*: expected the very SGLang 0\.5\.15's own kernel"):
        make(2, tmp_path)
