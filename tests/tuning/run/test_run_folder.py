"""Runs in the user's store: killed at any moment and gone on with, held by one process at a time, removed at last."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import pytest

from sglang_moe_ext.core import StoreError
from sglang_moe_ext.tuning.run import run_folder
from sglang_moe_ext.tuning.run.journal import Journal
from tests.tuning.journal_strategies import answer_of, halving, request

REPO_ROOT = Path(__file__).resolve().parents[3]
TUNER = Path(__file__).parents[1] / "children" / "tuner.py"
CIRCUMSTANCES = {"gpu": "table", "seed": 0}
BATCH_SIZES = 300
KILLS = 12


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of its own."""
    monkeypatch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path / "store"))
    return tmp_path / "store" / "runs"


def interrupted(count: int = 1) -> Path:
    """The folder of a run that ended after that many results."""
    with run_folder.begin(CIRCUMSTANCES) as run:
        for number in range(1, count + 1):
            run.journal.record(request(number), answer_of(request(number)))
    return run.folder


def finished() -> Path:
    with run_folder.begin(CIRCUMSTANCES) as run:
        run.finish()
    return run.folder


def started(asked: Path, batch_sizes: int) -> subprocess.Popen[str]:
    """A child that tunes in a store beside that file; it holds its run when this returns."""
    child = subprocess.Popen(
        [sys.executable, str(TUNER), str(asked), str(batch_sizes)],
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT), "SGLANG_MOE_EXT_STORE": str(asked.parent / "store")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stderr is not None
    assert child.stdout.readline() == "ready\n", child.stderr.read()
    return child


@dataclass(frozen=True, slots=True)
class Killed:
    """A run that was killed and gone on with until it was through."""

    said: str
    asked: list[str]
    asked_by_each_kill: list[int]
    store: Path


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    asked, dice, asked_by = tmp_path_factory.mktemp("killed") / "asked", random.Random(0), []
    while True:
        child = started(asked, BATCH_SIZES)
        if len(asked_by) < KILLS:
            time.sleep(dice.uniform(0, 0.02))
            child.kill()
        said, errors = child.communicate(timeout=60)
        if child.returncode == 0:
            lines = asked.read_text().splitlines()
            return Killed(said.splitlines()[-1], lines, asked_by, asked.parent / "store" / "runs")
        assert child.returncode == -signal.SIGKILL, errors
        asked_by.append(asked.read_bytes().count(b"\n"))


def test_the_kills_come_while_questions_are_asked(killed: Killed) -> None:
    assert len(set(killed.asked_by_each_kill) - {0}) > KILLS // 2


def test_each_kill_costs_one_question_at_most(killed: Killed) -> None:
    again = sum(Counter(killed.asked).values()) - len(set(killed.asked))
    assert again <= len(killed.asked_by_each_kill)


def test_a_run_that_was_killed_ends_as_one_that_was_not(killed: Killed, tmp_path: Path) -> None:
    measure = Journal.create(tmp_path / "straight.jsonl", {}).through(answer_of)
    assert killed.said == repr([halving(measure, tokens) for tokens in range(1, BATCH_SIZES + 1)])


def test_a_run_that_was_killed_stays_one_run(killed: Killed) -> None:
    assert len(list(killed.store.iterdir())) == 1


def test_a_second_process_does_not_go_on_with_a_run_that_is_held(tmp_path: Path) -> None:
    child = started(tmp_path / "asked", 10_000)
    (folder,) = (tmp_path / "store" / "runs").iterdir()
    try:
        with pytest.raises(StoreError, match=f"{folder} is being used by another process: wait"):
            run_folder.resume(CIRCUMSTANCES, folder)
    finally:
        child.kill()
        child.communicate(timeout=60)


def test_a_run_is_free_when_its_process_was_killed(tmp_path: Path) -> None:
    child = started(tmp_path / "asked", 10_000)
    child.kill()
    child.communicate(timeout=60)
    (folder,) = (tmp_path / "store" / "runs").iterdir()
    with run_folder.resume(CIRCUMSTANCES, None) as run:
        assert run.folder == folder


def test_of_many_who_resume_one_run_at_once_one_gets_it() -> None:
    folder, got, refused = interrupted(), [], []
    together = threading.Barrier(8)

    def resume() -> None:
        together.wait()
        try:
            got.append(run_folder.resume(CIRCUMSTANCES, folder))
        except StoreError:
            refused.append(folder)

    threads = [threading.Thread(target=resume) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)


def test_a_resumed_run_knows_what_was_answered() -> None:
    interrupted(3)
    with run_folder.resume(CIRCUMSTANCES, None) as run:
        assert [asked for asked, _ in run.journal.known()] == [request(1), request(2), request(3)]


def test_a_resumed_run_finds_its_binaries() -> None:
    with run_folder.begin(CIRCUMSTANCES) as run:
        (run.triton_cache / "kernel.cubin").touch()
    with run_folder.resume(CIRCUMSTANCES, None) as again:
        assert (again.triton_cache / "kernel.cubin").exists()


def test_the_newest_unfinished_run_is_resumed() -> None:
    interrupted()
    newest = interrupted()
    finished()
    with run_folder.resume(CIRCUMSTANCES, None) as run:
        assert run.folder == newest


def test_a_run_that_is_held_is_passed_over_for_an_older_one() -> None:
    older = interrupted()
    with run_folder.begin(CIRCUMSTANCES), run_folder.resume(CIRCUMSTANCES, None) as run:
        assert run.folder == older


def test_where_every_unfinished_run_is_held_that_is_said() -> None:
    with run_folder.begin(CIRCUMSTANCES), pytest.raises(StoreError, match="is being used by another process"):
        run_folder.resume(CIRCUMSTANCES, None)


def test_a_run_under_other_circumstances_is_not_the_newest() -> None:
    interrupted()
    with pytest.raises(
        StoreError, match=r"no unfinished run under these circumstances .*: leave --resume out to begin a new one$"
    ):
        run_folder.resume({**CIRCUMSTANCES, "seed": 1}, None)


def test_a_named_run_under_other_circumstances_is_refused_with_both_values() -> None:
    folder = interrupted()
    with pytest.raises(StoreError, match="seed is 0 there and 1 now"):
        run_folder.resume({**CIRCUMSTANCES, "seed": 1}, folder)


@pytest.mark.parametrize("named", [".", run_folder.JOURNAL], ids=["its folder", "its journal"])
def test_a_run_is_named_by(named: str) -> None:
    folder = interrupted()
    with run_folder.resume(CIRCUMSTANCES, folder / named) as run:
        assert run.folder == folder


def test_a_folder_that_is_no_run_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "stray").mkdir()
    with pytest.raises(StoreError, match="stray"):
        run_folder.resume(CIRCUMSTANCES, tmp_path / "stray")
    assert list((tmp_path / "stray").iterdir()) == []


def test_a_finished_run_that_is_named_answers_what_it_knows() -> None:
    folder = interrupted()
    with run_folder.resume(CIRCUMSTANCES, folder) as run:
        run.finish()
    with run_folder.resume(CIRCUMSTANCES, folder) as run:
        assert run.journal.result(request(1)) is not None


def test_a_finished_run_has_no_binaries() -> None:
    with run_folder.begin(CIRCUMSTANCES) as run:
        (run.triton_cache / "kernel.cubin").touch()
        run.finish()
    assert not run.triton_cache.exists()


def test_a_run_that_nobody_went_on_with_is_found_for_a_hint() -> None:
    folder = interrupted()
    assert run_folder.unfinished(CIRCUMSTANCES) == folder


@pytest.mark.parametrize(
    "made",
    [finished, lambda: run_folder.begin({"gpu": "other"}).close(), lambda: None],
    ids=["finished", "other", "none"],
)
def test_no_hint_where_the_only_run_is(made: Callable[[], object]) -> None:
    made()
    assert run_folder.unfinished(CIRCUMSTANCES) is None


def test_no_hint_where_the_only_run_is_going_on() -> None:
    with run_folder.begin(CIRCUMSTANCES):
        assert run_folder.unfinished(CIRCUMSTANCES) is None


@pytest.mark.parametrize("text", ["", '{"format":1,', "garbage\n"], ids=["empty", "cut short", "garbage"])
def test_a_run_whose_journal_never_began_is_not_resumed(text: str) -> None:
    (interrupted() / run_folder.JOURNAL).write_text(text)
    assert run_folder.unfinished(CIRCUMSTANCES) is None


def test_a_run_that_was_refused_for_its_journal_is_free_for_the_next() -> None:
    journal = interrupted() / run_folder.JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole.replace(b'{"s"', b'{"x"'))
    with pytest.raises(StoreError, match=":2: expected") as refused:
        run_folder.resume(CIRCUMSTANCES, journal)
    journal.write_bytes(whole)
    run_folder.resume(CIRCUMSTANCES, journal).close()
    assert refused.value.__traceback__ is not None  # what holds the error holds no run


def test_the_newest_finished_runs_are_kept(store: Path) -> None:
    made = [finished() for _ in range(run_folder.FINISHED_KEPT + 3)]
    with run_folder.begin(CIRCUMSTANCES) as run:
        assert set(store.iterdir()) == {*made[-run_folder.FINISHED_KEPT :], run.folder}


@pytest.mark.parametrize(("days", "stays"), [(29, True), (31, False)])
def test_an_unfinished_run_is_removed_when_it_was_left_for_a_month(days: int, stays: bool) -> None:
    folder = interrupted()
    aged(folder, days)
    run_folder.begin(CIRCUMSTANCES).close()
    assert folder.exists() == stays


def with_binaries(folder: Path) -> Path:
    """One more binary in that run."""
    (folder / "triton" / "kernel.cubin").touch()
    return folder / "triton" / "kernel.cubin"


def test_of_unfinished_runs_the_newest_alone_keeps_its_binaries() -> None:
    older, newest = with_binaries(interrupted()), with_binaries(interrupted())
    run_folder.begin(CIRCUMSTANCES).close()
    assert (older.exists(), newest.exists()) == (False, True)


def test_a_run_without_its_binaries_is_gone_on_with() -> None:
    older = interrupted()
    interrupted()
    run_folder.begin(CIRCUMSTANCES).close()
    with run_folder.resume(CIRCUMSTANCES, older) as run:
        assert run.triton_cache.is_dir() and run.journal.result(request(1)) is not None


def test_a_run_that_is_held_keeps_its_binaries_beside_the_newest_that_is_not() -> None:
    with run_folder.begin(CIRCUMSTANCES) as run:
        held, newest = with_binaries(run.folder), with_binaries(interrupted())
        run_folder.begin(CIRCUMSTANCES).close()
        assert (held.exists(), newest.exists()) == (True, True)


def test_a_run_that_is_held_is_never_removed() -> None:
    with run_folder.begin(CIRCUMSTANCES) as run:
        aged(run.folder, 31)
        run_folder.begin(CIRCUMSTANCES).close()
        assert run.folder.exists()


def test_what_is_no_run_is_never_removed(store: Path) -> None:
    store.mkdir(parents=True)
    (store / "my notes").mkdir()
    aged(store / "my notes", 400)
    run_folder.begin(CIRCUMSTANCES).close()
    assert (store / "my notes").exists()


def aged(folder: Path, days: float) -> None:
    """Last touched so many days ago."""
    then = time.time() - days * 86400
    for path in (*folder.iterdir(), folder):
        os.utime(path, (then, then))


def test_a_store_that_is_a_file_is_refused_with_the_way_round(store: Path) -> None:
    store.parent.mkdir()
    store.write_text("")
    with pytest.raises(StoreError, match=f"{store}.*SGLANG_MOE_EXT_STORE"):
        run_folder.begin(CIRCUMSTANCES)


def test_a_full_disk_is_refused_with_the_way_round_and_leaves_nothing(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_moe_ext.tuning.run.journal.FileIO", FullFile)
    with pytest.raises(StoreError, match=r"No space left.*SGLANG_MOE_EXT_STORE"):
        run_folder.begin(CIRCUMSTANCES)
    assert list(store.iterdir()) == []


class FullFile(FileIO):
    """A file on a disk without room."""

    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SGLANG_MOE_EXT_STORE")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(StoreError, match="Set SGLANG_MOE_EXT_STORE"):
        run_folder.begin(CIRCUMSTANCES)
