"""The measuring process: whatever a candidate does to its GPU costs that candidate alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_moe_ext.core import CompileKey, Failure, MoEExtError, TileConfig
from sglang_moe_ext.tuning.questions import Check, Checked, Race, Raced, Screen, Screened
from sglang_moe_ext.tuning.worker import Worker
from tests.tuning.fake_bench import EXITS, FINE, HANGS, OUT_OF_MEMORY, RAISES, SEGFAULTS, STICKY, MakeBench

KEY = CompileKey(16, 64, 64, 4, 3)
PAIR = {"up": TileConfig(16, 64, 64, 1, 4, 3), "down": TileConfig(16, 64, 64, 1, 4, 3)}


def screen(tokens: int = FINE) -> Screen:
    return Screen(tokens, "up", KEY, (1, 16), 2)


SCREENED = Screened(((1.0, 1.0), (16.0, 16.0)))


@pytest.fixture
def starts(tmp_path: Path) -> Path:
    return tmp_path / "starts"


@pytest.fixture
def worker(starts: Path) -> Iterator[Worker]:
    one = Worker(MakeBench(starts), timeout_s=5)
    yield one
    one.close()


def test_each_question_gets_its_answer(worker: Worker) -> None:
    answers = [worker.ask(asked) for asked in (screen(), Race(FINE, (PAIR,), 3), Check(FINE, PAIR))]  # type: ignore[arg-type]
    assert answers == [SCREENED, Raced(((10.0,) * 3,), 4), Checked(1e-3)]


def test_the_process_says_which_gpu_it_measures_on(worker: Worker) -> None:
    assert worker.device_name == "NVIDIA H200"


MISHAPS = {
    "error": (RAISES, "ValueError", "refused"),
    "exit": (EXITS, "Crash", "the measuring process died with exit code 7"),
    "segfault": (SEGFAULTS, "Crash", "the measuring process died with exit code -11"),
    "sticky CUDA error": (STICKY, "CudaError", "an illegal memory access was encountered"),
    "out of memory": (OUT_OF_MEMORY, "OutOfMemoryError", "no memory"),
}


@pytest.mark.parametrize(("does", "kind", "message"), MISHAPS.values(), ids=MISHAPS.keys())
def test_a_mishap_is_a_failure_that_says_what_happened(worker: Worker, does: int, kind: str, message: str) -> None:
    assert worker.ask(screen(does)) == Failure(kind, message)


@pytest.mark.parametrize("does", [does for does, _, _ in MISHAPS.values()], ids=MISHAPS.keys())
def test_a_mishap_costs_one_question(worker: Worker, does: int) -> None:
    worker.ask(screen(does))
    assert worker.ask(screen()) == SCREENED


def test_a_kernel_that_hangs_costs_its_time_limit_and_one_question(starts: Path) -> None:
    worker = Worker(MakeBench(starts), timeout_s=1)
    try:
        assert worker.ask(screen(HANGS)) == Failure("Timeout", "no answer within 1 s")
        assert worker.ask(screen()) == SCREENED
    finally:
        worker.close()


@pytest.mark.parametrize(("does", "begun"), [(RAISES, 1), (OUT_OF_MEMORY, 1), (STICKY, 2)])
def test_the_process_begins_anew_only_where_the_gpu_cannot_forget(
    worker: Worker, starts: Path, does: int, begun: int
) -> None:
    worker.ask(screen(does))
    worker.ask(screen())
    assert starts.stat().st_size == begun


def test_a_process_that_dies_at_its_start_is_started_again(starts: Path) -> None:
    worker = Worker(MakeBench(starts, failing_starts=2))
    try:
        assert worker.ask(screen()) == SCREENED
    finally:
        worker.close()


def test_a_process_that_never_starts_is_an_error(starts: Path) -> None:
    worker = Worker(MakeBench(starts, failing_starts=100))
    with pytest.raises(MoEExtError, match="the measuring process did not start: Crash"):
        worker.ask(screen())
    worker.close()


def test_an_engine_that_cannot_be_imported_is_an_error_in_its_own_words(starts: Path) -> None:
    worker = Worker(MakeBench(starts, error="no module named sgl_kernel"))
    with pytest.raises(MoEExtError, match="RuntimeError: no module named sgl_kernel"):
        worker.ask(screen())
    worker.close()


def test_each_process_has_the_environment_that_it_is_given(starts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAKE_GPU", raising=False)
    worker = Worker(SayGpu(), {"FAKE_GPU": "3"})
    try:
        assert worker.device_name == "GPU 3"
    finally:
        worker.close()


class SayGpu:
    def __call__(self) -> SayGpu:
        self.device_name = f"GPU {os.environ['FAKE_GPU']}"
        return self

    def answer(self, question: object) -> Checked:
        return Checked(0.0)


def test_close_does_not_wait_for_what_the_process_does(starts: Path) -> None:
    worker = Worker(MakeBench(starts))
    assert worker.device_name
    worker._connection.send(screen(HANGS))
    begun = time.monotonic()
    worker.close()
    assert time.monotonic() - begun < 5 and not worker._process.is_alive()
