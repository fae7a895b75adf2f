"""The compile pool in the background: what matters comes first, every question is answered, nothing is left over.

The kernel of these tests is `fake_kernel`; every process that a pool starts is known by the log in its environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_moe_ext.core import Failure, Resources
from sglang_moe_ext.tuning.compile import processes as compile_processes
from sglang_moe_ext.tuning.compile.cache import CompileCache
from sglang_moe_ext.tuning.compile.kernel_source import KernelSource
from sglang_moe_ext.tuning.compile.pool import CompilePool
from sglang_moe_ext.tuning.compile.worker import CompileChild, ForkServer
from tests.tuning import fake_kernel
from tests.tuning.compile.test_pool_compile import SOURCE, fine, job, jobs
from tests.tuning.fake_kernel import (
    EXITS,
    FINE,
    HANGS,
    OUT_OF_MEMORY,
    RAISES,
    REFUSED,
    RUNS_ASSEMBLER,
    SEGFAULTS,
    WAITS,
)

PATIENCE_S = 30.0
"""For what takes a moment on an idle machine."""


@pytest.fixture(autouse=True)
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "log"
    path.touch()
    monkeypatch.setenv(fake_kernel.LOG, str(path))
    return path


def pool(source: KernelSource = SOURCE, cache: CompileCache | None = None, **options: object) -> CompilePool:
    return CompilePool(source, cache=cache or CompileCache(None), **{"workers": 2, **options})  # type: ignore[arg-type]


def until(holds: Callable[[], object]) -> bool:
    """Whether it comes to hold within PATIENCE_S."""
    end = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def environment(pid: int) -> dict[str, str]:
    """What it was started with; empty for one that has ended."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode()
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)


def processes(log: Path) -> set[int]:
    """All that live with this log in their environment: nurseries, workers, and what those run."""
    pids = {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    return {pid for pid in pids if environment(pid).get(fake_kernel.LOG) == str(log)}


def begun(log: Path) -> list[int]:
    """BLOCK_SIZE_N of the jobs, in the order in which they were begun."""
    return [int(line.split()[0]) for line in log.read_text().splitlines()]


def workers(log: Path) -> list[int]:
    """The process that compiled each job, in the order in which they were begun."""
    return [int(line.split()[1]) for line in log.read_text().splitlines()]


def fork_server(log: Path) -> int:
    status = Path(f"/proc/{workers(log)[-1]}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("PPid")))


def release(log: Path) -> None:
    """Let the jobs that wait go on."""
    log.with_suffix(".go").touch()


def in_background(ask: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
    thread.start()
    return thread, answers


def test_the_caller_goes_on_while_binaries_are_made(log: Path) -> None:
    with pool() as busy:
        busy.want([job(1, WAITS)])
        assert until(lambda: begun(log) == [1])


def test_what_is_wanted_first_overtakes_what_waits(log: Path) -> None:
    with pool(workers=1) as busy:
        busy.want([job(1, WAITS), job(2), job(3)])
        assert until(lambda: begun(log) == [1])
        busy.want([job(8), job(9)], first=True)
        release(log)
        assert until(lambda: len(begun(log)) == 5)
    assert begun(log) == [1, 8, 9, 2, 3]


def test_what_waits_already_overtakes_once_it_is_wanted_first(log: Path) -> None:
    with pool(workers=1) as busy:
        busy.want([job(1, WAITS), *(job(n) for n in (2, 3, 4, 5))])
        assert until(lambda: begun(log) == [1])
        busy.want([job(4), job(5)], first=True)
        release(log)
        assert until(lambda: len(begun(log)) == 5)
    assert begun(log) == [1, 4, 5, 2, 3]


def test_a_job_that_somebody_waits_for_comes_before_what_is_only_wanted(log: Path) -> None:
    with pool(workers=1) as busy:
        busy.want([job(1, WAITS), job(2), job(3)])
        assert until(lambda: begun(log) == [1])
        threading.Timer(1.0, release, [log]).start()
        busy.result(job(9))
        assert begun(log)[:2] == [1, 9]


def test_a_job_that_many_threads_ask_for_is_compiled_once(log: Path) -> None:
    with pool() as shared:
        asked = [in_background(lambda: [shared.result(each) for each in jobs(5)]) for _ in range(4)]
        for thread, _ in asked:
            thread.join(PATIENCE_S)
    assert sorted(begun(log)) == [1, 2, 3, 4, 5]


def test_every_thread_that_asks_for_a_job_is_answered() -> None:
    with pool() as shared:
        asked = [in_background(lambda: [shared.result(each) for each in jobs(5)]) for _ in range(4)]
        for thread, _ in asked:
            thread.join(PATIENCE_S)
    assert [answers for _, answers in asked] == [[list(fine(jobs(5)).values())]] * 4


def test_no_more_workers_are_forked_than_were_asked_for(log: Path) -> None:
    with pool(workers=2) as busy:
        busy.want(jobs(12))
        for each in jobs(12):
            busy.result(each)
    assert len(set(workers(log))) <= 2


def test_nothing_is_started_for_what_is_known_already(log: Path) -> None:
    cache = CompileCache(None)
    cache.put(SOURCE, job(1), Resources(1, 2, 0))
    with pool(cache=cache) as idle:
        idle.result(job(1))
        assert processes(log) == set()


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.sampled_from([FINE, EXITS, SEGFAULTS, RAISES, OUT_OF_MEMORY, REFUSED]), min_size=1, max_size=12)
)
def test_whatever_goes_wrong_costs_just_the_jobs_that_did_it(kinds: list[int]) -> None:
    asked = [job(n, kind) for n, kind in enumerate(kinds, 1)]
    with pool() as busy:
        busy.want(asked)
        healthy = [isinstance(busy.result(each), Resources) for each in asked]
    assert healthy == [kind == FINE for kind in kinds]


@pytest.mark.parametrize("does", [HANGS, RUNS_ASSEMBLER], ids=["compiler", "assembler"])
def test_a_hang_is_ended_and_called_a_timeout(does: int) -> None:
    with pool(timeout_s=1.0) as busy:
        found = busy.result(job(1, does))
    assert isinstance(found, Failure) and found.kind == "Timeout"


def test_a_hang_costs_its_own_job_alone() -> None:
    with pool(timeout_s=3.0) as busy:
        busy.want([job(98, HANGS), job(99, HANGS), *jobs(4)])
        assert {each: busy.result(each) for each in jobs(4)} == fine(jobs(4))


def test_an_assembler_that_hangs_ends_with_its_worker(log: Path) -> None:
    with pool(timeout_s=1.0) as busy:
        busy.result(job(1, RUNS_ASSEMBLER))
        assert until(lambda: len(processes(log)) == 1)  # the fork_server


@pytest.mark.parametrize(
    ("does", "how"), [(EXITS, "exit code 1"), (SEGFAULTS, "Segmentation fault")], ids=["exit", "segmentation fault"]
)
def test_a_crash_says_how_the_compiler_ended(does: int, how: str) -> None:
    with pool() as busy:
        found = busy.result(job(1, does))
    assert isinstance(found, Failure) and how in found.message


def test_a_worker_that_is_killed_while_idle_costs_nothing(log: Path) -> None:
    with pool(workers=1) as busy:
        busy.result(job(1))
        idle = workers(log)[0]
        os.kill(idle, signal.SIGKILL)
        assert until(lambda: not Path(f"/proc/{idle}").exists())
        assert busy.result(job(2)) == Resources(2, 64, 0)


def test_a_worker_that_has_compiled_much_makes_room_for_a_fresh_one(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_processes, "BINARIES_A_WORKER", 2)
    with pool(workers=1) as busy:
        for each in jobs(6):
            busy.result(each)
    a, b, c, d, e, f = workers(log)
    assert a == b != c == d != e == f


@pytest.mark.parametrize("room", [0, 1], ids=["none", "one"])
def test_a_machine_without_room_for_more_processes_compiles_with_those_it_has(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork, forked = ForkServer.fork, []

    def cramped(fork_server: ForkServer) -> CompileChild:
        if len(forked) == room:
            raise BlockingIOError("no more processes")
        forked.append(fork(fork_server))
        return forked[-1]

    monkeypatch.setattr(ForkServer, "fork", cramped)
    with pool() as busy:
        busy.want(jobs(4))
        assert [isinstance(busy.result(each), Resources) for each in jobs(4)] == [bool(room)] * 4


UNABLE = {"raises": "no operators for this machine", "exits": "exit code 3", "hangs": "not imported within 1 s"}


@pytest.mark.parametrize("does", UNABLE)
def test_a_kernel_that_cannot_be_imported_fails_every_job(does: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fake_kernel.ON_IMPORT, does)
    monkeypatch.setattr(compile_processes, "START_TIMEOUT_S", 1.0 if does == "hangs" else PATIENCE_S)
    with pool() as unable:
        unable.want(jobs(4))
        assert all(isinstance(unable.result(each), Failure) for each in jobs(4))


@pytest.mark.parametrize(("does", "why"), UNABLE.items(), ids=UNABLE)
def test_the_failure_says_why_the_kernel_cannot_be_imported(
    does: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fake_kernel.ON_IMPORT, does)
    monkeypatch.setattr(compile_processes, "START_TIMEOUT_S", 1.0 if does == "hangs" else PATIENCE_S)
    with pool() as unable:
        found = unable.result(job(1))
    assert isinstance(found, Failure) and why in found.message


def test_a_kernel_module_that_is_not_there_is_named() -> None:
    with pool(KernelSource("none", "tests.tuning.no_such_kernel", "1", False)) as unable:
        found = unable.result(job(1))
    assert isinstance(found, Failure) and "tests.tuning.no_such_kernel" in found.message


def test_a_kernel_that_could_not_be_imported_fails_later_jobs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fake_kernel.ON_IMPORT, "raises")
    with pool() as unable:
        assert unable.result(job(1)) == unable.result(job(2)) == unable.unable


def test_a_pool_that_was_closed_was_not_unable() -> None:
    with pool() as closed:
        closed.result(job(1))
    assert closed.unable is None


@pytest.mark.parametrize("does", UNABLE)
def test_that_nothing_can_be_compiled_is_told_from_what_a_job_does(does: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fake_kernel.ON_IMPORT, does)
    monkeypatch.setattr(compile_processes, "START_TIMEOUT_S", 1.0 if does == "hangs" else PATIENCE_S)
    with pool() as unable:
        found = unable.result(job(1))
    assert isinstance(found, Failure) and found.kind == "CompilePoolUnable"


def test_that_a_kernel_could_not_be_imported_is_no_knowledge_of_its_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CompileCache(None)
    monkeypatch.setenv(fake_kernel.ON_IMPORT, "refuses")
    with pool(cache=cache) as unable:
        unable.result(job(1))
    monkeypatch.delenv(fake_kernel.ON_IMPORT)
    with pool(cache=cache) as able:
        assert able.result(job(1)) == Resources(1, 64, 0)


@contextlib.contextmanager
def orphaned(log: Path, times: int) -> Iterator[CompilePool]:
    """A pool whose fork_server was killed so many times while it compiled job 1, which waits."""
    with pool() as busy:
        busy.want([job(1, WAITS)])
        for time_ in range(1, times + 1):
            assert until(lambda: begun(log) == [1] * time_)  # noqa: B023 - asked at once
            os.kill(fork_server(log), signal.SIGKILL)
        yield busy


def test_a_fork_server_that_is_killed_is_started_once_more_and_costs_no_job(log: Path) -> None:
    with orphaned(log, 1) as able:
        release(log)
        found = [able.result(job(1, WAITS)), able.result(job(2))]
        assert (found, able.unable) == ([Resources(1, 64, 0), Resources(2, 64, 0)], None)


def test_a_fork_server_that_is_killed_twice_leaves_no_question_open(log: Path) -> None:
    with orphaned(log, 2) as unable:
        found = [unable.result(job(1, WAITS)), unable.result(job(2))]
        assert [each.kind for each in found if isinstance(each, Failure)] == ["CompilePoolUnable"] * 2


def test_a_pool_that_is_closed_leaves_no_process(log: Path) -> None:
    with pool() as busy:
        busy.want([job(1, RUNS_ASSEMBLER), job(2, HANGS)])
        assert until(lambda: len(processes(log)) == 4)  # the fork_server, two workers, an assembler
    assert until(lambda: not processes(log))


def test_a_pool_that_is_closed_while_it_imports_leaves_no_process(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fake_kernel.ON_IMPORT, "hangs")
    with pool() as busy:
        busy.want([job(1)])
        assert until(lambda: processes(log))
    assert until(lambda: not processes(log))


def test_who_waits_for_a_job_is_answered_when_the_pool_is_closed(log: Path) -> None:
    with pool() as busy:
        thread, answers = in_background(lambda: busy.result(job(1, HANGS)))
        assert until(lambda: begun(log) == [1])
    thread.join(PATIENCE_S)
    assert [answer.kind for answer in answers if isinstance(answer, Failure)] == ["Closed"]


def test_a_closed_pool_still_knows_what_it_compiled() -> None:
    with pool() as closed:
        closed.result(job(1))
    assert (closed.result(job(1)), isinstance(closed.result(job(2)), Failure)) == (Resources(1, 64, 0), True)


def test_a_closed_pool_can_be_closed_again() -> None:
    closed = pool()
    closed.close()
    closed.close()


def test_what_a_pool_wrote_aside_goes_with_it(log: Path) -> None:
    with pool() as busy:
        busy.result(job(1))
        scratch = Path(environment(workers(log)[0])["TMPDIR"])
        assert scratch.is_dir()
    assert not scratch.exists()


def test_binaries_lie_where_the_launching_process_looks_for_them(log: Path, tmp_path: Path) -> None:
    with pool(triton_cache=tmp_path / "triton") as busy:
        busy.result(job(1))
        assert environment(workers(log)[0])["TRITON_CACHE_DIR"] == str(tmp_path / "triton")


def test_an_interrupt_of_the_caller_does_not_reach_the_compilers(log: Path) -> None:
    with pool() as busy:
        busy.result(job(1))
        assert os.getpgrp() not in {os.getpgid(pid) for pid in processes(log)}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_of_the_pool_itself_leaves_no_question_open() -> None:
    def progress(done: int, of: int) -> None:
        raise ValueError("no terminal")

    with pool(progress=progress) as broken:
        assert broken.result(job(2)) == broken.unable


OWNER = """
from tests.tuning.compile.test_pool import WAITS, pool, job, time
busy = pool()
busy.result(job(1))
busy.want([job(2, WAITS), job(3)])
time.sleep(600)
"""


def test_a_pool_whose_owner_is_killed_leaves_no_process(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the scratch folder is the owner's to remove, and stays
    owner = subprocess.Popen([sys.executable, "-c", OWNER], cwd=Path(__file__).parents[3])
    assert until(lambda: sorted(begun(log)) == [1, 2, 3])
    owner.kill()
    owner.wait()
    assert until(lambda: not processes(log))
