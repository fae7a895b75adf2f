"""The measuring process: whatever a candidate does to its GPU costs that candidate alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_moe_ext.core import CompileKey, Failure, MoEExtError, TileConfig
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchGemm,
    BenchLayers,
    BenchRequest,
    CheckAccuracy,
    GemmTimes,
    LayerTimes,
)
from sglang_moe_ext.tuning.bench.worker import BenchProcess
from tests.tuning.fake_bench import (
    EXITS,
    FINE,
    HANGS,
    OUT_OF_MEMORY,
    POISONS,
    RAISES,
    SEGFAULTS,
    STICKY,
    WARNS,
    MakeBench,
)

KEY = CompileKey(16, 64, 64, 4, 3)
PAIR = {"up": TileConfig(16, 64, 64, 1, 4, 3), "down": TileConfig(16, 64, 64, 1, 4, 3)}


def screen(tokens: int = FINE) -> BenchGemm:
    return BenchGemm(tokens, "up", KEY, (1, 16), 2)


SCREENED = GemmTimes(((1.0, 1.0), (16.0, 16.0)))


@pytest.fixture
def starts(tmp_path: Path) -> Path:
    return tmp_path / "starts"


@pytest.fixture
def worker(starts: Path) -> Iterator[BenchProcess]:
    one = BenchProcess(MakeBench(starts), timeout_s=60)
    yield one
    one.close()


def test_each_question_gets_its_answer(worker: BenchProcess) -> None:
    results = [worker.measure(asked) for asked in (screen(), BenchLayers(FINE, (PAIR,), 3), CheckAccuracy(FINE, PAIR))]  # type: ignore[arg-type]
    assert results == [SCREENED, LayerTimes(((10.0,) * 3,), 4), Accuracy(1e-3)]


def test_the_process_says_which_gpu_it_measures_on(worker: BenchProcess) -> None:
    assert worker.device_name == "NVIDIA H200"


MISHAPS = {
    "error": (RAISES, "ValueError", "refused"),
    "exit": (EXITS, "Crash", "the measuring process died with exit code 7"),
    "segfault": (SEGFAULTS, "Crash", "the measuring process died with exit code -11"),
    "sticky CUDA error": (STICKY, "CudaError", "an illegal memory access was encountered"),
    "sticky error of Triton's": (
        POISONS,
        "CudaError",
        "Triton Error [CUDA]: an illegal memory access was encountered",
    ),
    "out of memory": (OUT_OF_MEMORY, "OutOfMemoryError", "no memory"),
}


@pytest.mark.parametrize(("does", "kind", "message"), MISHAPS.values(), ids=MISHAPS.keys())
def test_a_mishap_is_a_failure_that_says_what_happened(
    worker: BenchProcess, does: int, kind: str, message: str
) -> None:
    assert worker.measure(screen(does)) == Failure(kind, message)


@pytest.mark.parametrize("does", [does for does, _, _ in MISHAPS.values()], ids=MISHAPS.keys())
def test_a_mishap_costs_one_question(worker: BenchProcess, does: int) -> None:
    worker.measure(screen(does))
    assert worker.measure(screen()) == SCREENED


def test_a_kernel_that_hangs_costs_its_time_limit_and_one_question(starts: Path) -> None:
    worker = BenchProcess(MakeBench(starts), timeout_s=1)
    try:
        assert worker.measure(screen(HANGS)) == Failure("Timeout", "no result within 1 s")
        assert worker.measure(screen()) == SCREENED
    finally:
        worker.close()


@pytest.mark.parametrize(("does", "begun"), [(RAISES, 1), (OUT_OF_MEMORY, 1), (STICKY, 2), (POISONS, 2)])
def test_the_process_begins_anew_only_where_the_gpu_cannot_forget(
    worker: BenchProcess, starts: Path, does: int, begun: int
) -> None:
    worker.measure(screen(does))
    worker.measure(screen())
    assert starts.stat().st_size == begun


def test_a_process_that_dies_at_its_start_is_started_again(starts: Path) -> None:
    worker = BenchProcess(MakeBench(starts, failing_starts=2))
    try:
        assert worker.measure(screen()) == SCREENED
    finally:
        worker.close()


def test_a_process_that_never_starts_is_an_error(starts: Path) -> None:
    worker = BenchProcess(MakeBench(starts, failing_starts=100))
    with pytest.raises(MoEExtError, match="the measuring process did not start: Crash"):
        worker.measure(screen())
    worker.close()


def test_a_process_that_never_starts_is_not_started_again_when_it_is_given_up(starts: Path) -> None:
    worker = BenchProcess(MakeBench(starts, failing_starts=100))
    with pytest.raises(MoEExtError):
        worker.measure(screen())
    assert (starts.stat().st_size, multiprocessing.active_children()) == (3, [])
    worker.close()


@pytest.mark.parametrize(
    "asked",
    [screen(), BenchLayers(FINE, (PAIR,), 3), CheckAccuracy(FINE, PAIR)],  # type: ignore[arg-type]
    ids=["screen", "race", "check"],
)
def test_each_kind_of_request_has_its_time_limit(
    asked: BenchRequest, starts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = replace(asked, tokens=HANGS)
    monkeypatch.setattr(type(asked), "TIME_LIMIT_S", 1.0)
    worker = BenchProcess(MakeBench(starts))
    try:
        assert worker.measure(hanging) == Failure("Timeout", "no result within 1 s")
    finally:
        worker.close()


def test_a_process_that_dies_before_it_sees_the_question_costs_nothing(worker: BenchProcess) -> None:
    assert worker.device_name and worker._process.pid is not None
    os.kill(worker._process.pid, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, [worker._process.pid, signal.SIGKILL]).start()
    assert worker.measure(screen()) == SCREENED


def test_our_own_warnings_are_heard_and_no_others(capfd: pytest.CaptureFixture[str], starts: Path) -> None:
    worker = BenchProcess(MakeBench(starts))
    try:
        worker.measure(screen(WARNS))
    finally:
        worker.close()
    assert capfd.readouterr().err == "sglang_moe_ext.tuning warns\n"


def test_an_engine_that_cannot_be_imported_is_an_error_in_its_own_words(starts: Path) -> None:
    worker = BenchProcess(MakeBench(starts, error="no module named sgl_kernel"))
    with pytest.raises(MoEExtError, match="RuntimeError: no module named sgl_kernel"):
        worker.measure(screen())
    worker.close()


def test_each_process_has_the_environment_that_it_is_given(starts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAKE_GPU", raising=False)
    worker = BenchProcess(SayGpu(), {"FAKE_GPU": "3"})
    try:
        assert worker.device_name == "GPU 3"
    finally:
        worker.close()


class SayGpu:
    def __call__(self) -> SayGpu:
        self.device_name = f"GPU {os.environ['FAKE_GPU']}"
        return self

    def measure(self, request: object) -> Accuracy:
        return Accuracy(0.0)


def test_close_does_not_wait_for_what_the_process_does(starts: Path) -> None:
    worker = BenchProcess(MakeBench(starts))
    assert worker.device_name
    worker._connection.send(screen(HANGS))
    begun = time.monotonic()
    worker.close()
    assert time.monotonic() - begun < 5 and not worker._process.is_alive()


@pytest.fixture(params=["while it starts", "while it results"])
def waiting(request: pytest.FixtureRequest, worker: BenchProcess) -> tuple[threading.Thread, list[object]]:
    """A thread that asks what is never answered, and what it got."""
    if request.param == "while it results":
        assert worker.device_name
    got: list[object] = []
    thread = threading.Thread(target=lambda: got.append(worker.measure(screen(HANGS))), daemon=True)
    thread.start()
    time.sleep(0.2)
    return thread, got


def test_who_asks_while_it_is_closed_is_interrupted(
    worker: BenchProcess, waiting: tuple[threading.Thread, list[object]]
) -> None:
    thread, got = waiting
    worker.close()
    thread.join(5)
    assert got == [Failure("Interrupted", "the measuring process was closed")]


@pytest.mark.usefixtures("waiting")
def test_no_process_is_started_once_it_is_closed(worker: BenchProcess) -> None:
    worker.close()
    worker.measure(screen())
    assert multiprocessing.active_children() == []


def test_who_wants_the_name_of_a_closed_one_is_told(worker: BenchProcess) -> None:
    worker.close()
    with pytest.raises(MoEExtError, match="was closed"):
        worker.device_name  # noqa: B018 - it waits for the process


def test_it_can_be_closed_again(worker: BenchProcess) -> None:
    worker.close()
    worker.close()
