"""A real Ray cluster of one node with two GPUs that are tables: the same results, also where it falls apart."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.core import CompileJob, Failure, GpuError, MoEExtError, Resources, Target
from sglang_moe_ext.tuning.bench.messages import Accuracy, BenchRequest, BenchResult, CheckAccuracy
from sglang_moe_ext.tuning.run import executor, ray_executor
from sglang_moe_ext.tuning.run.executor import BenchProcessLike, CompilePoolLike, Executor
from sglang_moe_ext.tuning.run.ray_executor import Make
from tests.tuning.run.test_executor import (
    H100,
    KEYS,
    L4,
    SHAPE,
    TASKS,
    RecordedCompilePool,
    RecordedWorker,
    alone,
    recorded_needs,
    unseen,
)

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'sglang-moe-ext[ray]'")

HERE = Path(__file__).resolve().parents[1]
REPO_ROOT = HERE.parents[1]
QUESTION = CheckAccuracy(1, {})
JOB = CompileJob(SHAPE, "up", 1, KEYS[0], Target(90))
SOON_S = 20.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    folder = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)  # pytest's is too long for a socket
    with folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (REPO_ROOT, HERE))))  # of the actors
        patch.setenv("TMPDIR", folder.name)
        patch.setenv("HOME", folder.name)  # Ray leaves its token there
        for name in ("RAY_AUTH_MODE", "RAY_ADDRESS"):
            patch.setenv(name, "")  # so that what Ray sets there is undone
            patch.delenv(name)
        ray.init(
            address="local",
            num_gpus=2,
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80 << 20,
            log_to_driver=False,
            logging_level="WARNING",
            _temp_dir=folder.name,
        )
        yield
        ray.shutdown()


@contextlib.contextmanager
def executors(make: Make, tuned_for: str = H100) -> Iterator[Sequence[Executor]]:
    found = ray_executor.ray_executors(None, tuned_for, make)
    try:
        yield found
    finally:
        executor.close_all(found)


def recorded(cores: int, folder: Path) -> tuple[CompilePoolLike, BenchProcessLike]:
    return RecordedCompilePool(), RecordedWorker(seconds=0.01)


def of_two_models(cores: int, folder: Path) -> tuple[CompilePoolLike, BenchProcessLike]:
    return RecordedCompilePool(), RecordedWorker(device_name={"0": H100, "1": L4}[os.environ["CUDA_VISIBLE_DEVICES"]])


def absent_on_gpu_1(cores: int, folder: Path) -> tuple[CompilePoolLike, BenchProcessLike]:
    if os.environ["CUDA_VISIBLE_DEVICES"] == "1":
        raise MoEExtError("the measuring process did not start: RuntimeError: no CUDA")
    return recorded(cores, folder)


def of_its_share(cores: int, folder: Path) -> tuple[CompilePoolLike, BenchProcessLike]:
    """A pool that leaves a file, and says what it was given."""

    class CompilePool(RecordedCompilePool):
        def result(self, job: CompileJob) -> Resources | Failure:
            (folder / "binary").touch()
            return Failure(str(cores), str(folder))

    return CompilePool(), RecordedWorker()


SETS_FREE, FAILS, DIES, IS_BROKEN, EXITS = range(10_000, 10_005)
"""Numbers of tokens: of a request that a binary waits for, and of some that end badly."""


def moody(cores: int, folder: Path) -> tuple[CompilePoolLike, BenchProcessLike]:
    """As the record says, but for those numbers of tokens."""
    free = threading.Event()

    class CompilePool(RecordedCompilePool):
        def result(self, job: CompileJob) -> Resources | Failure:
            if job.tokens == SETS_FREE and not free.wait(SOON_S):
                return Failure("Timeout", "no request came through")
            return super().result(job)

    class Worker(RecordedWorker):
        def measure(self, request: BenchRequest) -> BenchResult:
            if request.tokens == FAILS:
                return Failure("OutOfResources", "shared memory")
            if request.tokens == DIES:
                raise MoEExtError("the measuring process did not start: no CUDA")
            if request.tokens == IS_BROKEN:
                raise ZeroDivisionError("by zero")
            if request.tokens == EXITS:
                os._exit(1)
            if request.tokens == SETS_FREE:
                free.set()
            return super().measure(request)

    return CompilePool(), Worker(seconds=0.01)


@pytest.fixture(scope="class")
def pair(cluster: None) -> Iterator[Sequence[Executor]]:
    with executors(moody) as found:
        yield found


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not the cluster of this module runs."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def test_without_ray_the_user_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MoEExtError, match=r"pip install 'sglang-moe-ext\[ray\]'"):
        ray_executor.ray_executors(None, H100, recorded)


@pytest.mark.parametrize(
    "address",
    ["local", "10.0.0.3", "ray://127.0.0.1:1", "127.0.0.1:1", "127.0.0.1:99999", "127.0.0.1:-1", "127.0.0.1:", "\0:1"],
)
def test_an_address_where_no_cluster_answers_is_named_at_once(unconnected: None, address: str) -> None:
    with pytest.raises(MoEExtError, match=r"no Ray cluster results at .*: expected HOST:PORT"):
        ray_executor.ray_executors(address, H100, recorded)


def test_the_address_may_come_from_rays_own_variable(unconnected: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(MoEExtError, match=r"no Ray cluster results at '127\.0\.0\.1:1'"):
        ray_executor.ray_executors(None, H100, recorded)


def test_without_an_address_a_cluster_that_runs_is_joined_and_none_started(
    unconnected: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finds_none(address: str, **_: object) -> None:
        raise ConnectionError(f"{address} found nothing")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", finds_none)
    with pytest.raises(
        MoEExtError, match=r"no Ray cluster can be joined .*: auto found nothing; first run `ray start`"
    ):
        ray_executor.ray_executors(None, H100, recorded)


@pytest.fixture
def bare_node(tmp_path: Path) -> dict[str, str]:
    """An environment in which Ray's processes do not find this package."""
    return {**os.environ, "PYTHONPATH": "", "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(tmp_path)}


_ON_A_BARE_NODE = """
import sys
sys.path.append(sys.argv[1])  # of this process alone
import ray
from sglang_moe_ext.core import GpuError
from sglang_moe_ext.tuning.run import ray_executor
ray.init(address="local", num_gpus=1, num_cpus=1, include_dashboard=False, object_store_memory=80 << 20,
         log_to_driver=False, logging_level="WARNING", _temp_dir=sys.argv[2])
try:
    ray_executor.ray_executors(None, "NVIDIA L4", lambda cores, folder: (None, None))
except GpuError as error:
    print(error)
ray.shutdown()
"""


def test_a_node_without_this_package_is_named(bare_node: dict[str, str], tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-c", _ON_A_BARE_NODE, str(REPO_ROOT), folder]
        said = subprocess.run(command, cwd=tmp_path, env=bare_node, capture_output=True, text=True, check=True)
    assert re.search(r"\d: .*No module named 'sglang_moe_ext' \(expected .* installed, as here\)", said.stdout)


class TestAPairOfStations:
    """They share two actors, which take a second to start."""

    def test_a_cluster_finds_what_one_executor_finds(self, pair: Sequence[Executor]) -> None:
        assert executor.run_tasks(pair, TASKS, unseen) == alone()

    def test_a_executor_is_called_by_its_node_and_its_gpu(self, pair: Sequence[Executor]) -> None:
        assert [executor.name for executor in pair] == [f"{ray.util.get_node_ip_address()} GPU {gpu}" for gpu in (0, 1)]

    def test_waiting_for_a_binary_keeps_no_question_waiting(self, pair: Sequence[Executor]) -> None:
        made: list[Resources | Failure] = []
        job = replace(JOB, tokens=SETS_FREE)
        pair[0].want([job])
        waiting = threading.Thread(target=lambda: made.append(pair[0].binary(job)))
        waiting.start()
        waiting.join(0.5)
        assert pair[0].measure(CheckAccuracy(SETS_FREE, {})) == Accuracy(1e-3)
        waiting.join(SOON_S)
        assert made == [recorded_needs(job)]

    def test_a_failure_is_an_answer(self, pair: Sequence[Executor]) -> None:
        assert pair[0].measure(CheckAccuracy(FAILS, {})) == Failure("OutOfResources", "shared memory")

    @pytest.mark.parametrize(
        ("tokens", "says"),
        [(DIES, "the measuring process did not start: no CUDA"), (IS_BROKEN, "ZeroDivisionError: by zero")],
        ids=["ours", "a bug"],
    )
    def test_an_error_there_names_its_executor_in_one_line(
        self, pair: Sequence[Executor], tokens: int, says: str
    ) -> None:
        with pytest.raises(MoEExtError) as raised:
            pair[0].measure(CheckAccuracy(tokens, {}))
        assert str(raised.value) == f"{pair[0].name}: {says}"

    def test_a_process_that_ends_takes_its_executor_with_it(self, pair: Sequence[Executor]) -> None:
        """The last of these tests."""
        with pytest.raises(MoEExtError, match=f"{pair[1].name} is gone"):
            pair[1].measure(CheckAccuracy(EXITS, {}))


def test_an_actor_killed_in_the_middle_changes_no_result(cluster: None) -> None:
    with executors(recorded) as found:
        lost: Any = found[0]

        def kill_one(done: int, of: int) -> None:
            if done == 2:
                ray.kill(lost.actor)

        assert executor.run_tasks(found, TASKS, kill_one) == alone()
        with pytest.raises(MoEExtError, match=r"GPU 0 is gone"):
            lost.measure(QUESTION)


def test_gpus_of_another_model_are_left_out(cluster: None, caplog: pytest.LogCaptureFixture) -> None:
    with executors(of_two_models, L4) as found:
        (executor,) = found
        assert executor.name.endswith("GPU 1")
    assert f"GPU 0 is {H100}" in caplog.text


def test_a_cluster_without_such_a_gpu_says_which_it_has(cluster: None) -> None:
    with pytest.raises(GpuError, match=rf"tune for NVIDIA H200: \S+ GPU 0 is {H100}; \S+ GPU 1 is {L4}"):
        ray_executor.ray_executors(None, "NVIDIA H200", of_two_models)


def test_a_gpu_that_does_not_start_is_left_out(cluster: None, caplog: pytest.LogCaptureFixture) -> None:
    with executors(absent_on_gpu_1) as found:
        (executor,) = found
        assert executor.name.endswith("GPU 0")
    assert "GPU 1: the measuring process did not start: RuntimeError: no CUDA" in caplog.text


def test_gpus_in_use_by_another_job_are_not_waited_for(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "_PLACED_WITHIN_S", 0.5)
    holder = ray.remote(num_gpus=2, num_cpus=0)(RecordedWorker).remote()
    ray.get(holder.measure.remote(QUESTION))
    try:
        with pytest.raises(GpuError, match=r"\d: no result in time \(expected a free GPU"):
            ray_executor.ray_executors(None, H100, recorded)
    finally:
        ray.kill(holder)


def test_a_node_with_another_version_is_named(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "__version__", "0.0.0")
    with pytest.raises(GpuError, match=r"\d has sglang-moe-ext \S+ \(expected 0\.0\.0, as here"):
        ray_executor.ray_executors(None, H100, recorded)


def test_a_node_that_cannot_import_what_it_needs_is_named(cluster: None, tmp_path: Path) -> None:
    (tmp_path / "only_here.py").write_text("def make(cores, folder): ...\n")
    sys.path.append(str(tmp_path))
    try:
        make: Make = __import__("only_here").make
        with pytest.raises(GpuError, match=r"\S+ GPU 0: .*No module named 'only_here'"):
            ray_executor.ray_executors(None, H100, make)
    finally:
        sys.path.remove(str(tmp_path))


def test_each_executor_has_its_share_of_the_cores_and_a_folder_until_it_is_closed(cluster: None) -> None:
    with executors(of_its_share) as found:
        told = [executor.binary(JOB) for executor in found]
        assert [failure.kind for failure in told if isinstance(failure, Failure)] == ["1", "1"]
        folders = {Path(failure.message) for failure in told if isinstance(failure, Failure)}
        assert [folder.is_dir() for folder in folders] == [True, True]
        found[0].close()  # closing twice does no harm
    assert not any(folder.exists() for folder in folders)
