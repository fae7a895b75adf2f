"""Tuning before a server loads its model. There is no GPU: a stand-in measures nothing and writes a table."""

from __future__ import annotations

import dataclasses
import itertools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_moe_ext import env
from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines.starting_layer import LARGEST_TOKENS, StartingLayer, choose_batch_sizes, group_gpus
from sglang_moe_ext.serving import autotune, tuner_process
from sglang_moe_ext.serving.tuner_process import TuneOutcome, Tuner, tune_once
from tests.engines.installed import REPO_ROOT

STAND_IN = Path(__file__).parent / "children" / "stand_in_tuner.py"
COMMAND = (sys.executable, "-W", "ignore", str(STAND_IN))
FLAGS = ("--model", "GLM-4.7-Flash", "--batch-size", "1", "64")
SERVER = """
import sys, time
from pathlib import Path
from sglang_moe_ext.serving import tuner_process
tuner_process.COMMAND = tuple(sys.argv[2:])
print(tuner_process.tune_once(tuner_process.Tuner(Path(sys.argv[1]), ("--batch-size", "1"), 60.0), time.time()).text)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that tells the stand-in what to do: to write a table, until a test says otherwise."""
    for name, text in (("does", "tune"), ("table", "{}"), ("place", str(tmp_path / "store" / "table.json"))):
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(REPO_ROOT))
    monkeypatch.setattr(tuner_process, "COMMAND", COMMAND)
    yield tmp_path


def tuner(folder: Path, seconds: float = 60.0) -> Tuner:
    return Tuner(folder / "autotune" / "layer", FLAGS, seconds)


def runs(folder: Path) -> list[int]:
    """Process ids of all runs."""
    file = folder / "runs"
    return [int(line.split()[0]) for line in file.read_text().splitlines()] if file.exists() else []


def is_gone(pid: int) -> bool:
    until = time.monotonic() + 5.0
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def at_once(folder: Path, ranks: int) -> list[TuneOutcome]:
    """What came of the same wish of so many ranks; a lock of `flock` holds between threads as between processes."""
    found: list[TuneOutcome] = []
    asked = time.time()
    threads = [threading.Thread(target=lambda: found.append(tune_once(tuner(folder), asked))) for _ in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_and_servers_at_once_run_one_tuner(stand_in: Path) -> None:
    found = at_once(stand_in, 4)
    assert len(runs(stand_in)) == 1
    assert [outcome.is_settled for outcome in found] == [True] * 4
    assert len([outcome for outcome in found if outcome.text]) == 1


def test_a_failed_run_is_not_repeated_by_those_that_waited_for_it(stand_in: Path) -> None:
    (stand_in / "does").write_text("fail")
    found = at_once(stand_in, 3)
    assert len(runs(stand_in)) == 1
    assert all("no GPU answers" in outcome.text and not outcome.is_settled for outcome in found)


def test_a_later_start_tries_again_after_a_failure_and_not_after_a_success(stand_in: Path) -> None:
    (stand_in / "does").write_text("crash")
    assert "ended with status" in tune_once(tuner(stand_in), time.time()).text
    (stand_in / "does").write_text("tune")
    assert "tuned 2 batch sizes" in tune_once(tuner(stand_in), time.time()).text
    assert tune_once(tuner(stand_in), time.time()).text == ""
    assert len(runs(stand_in)) == 2


@pytest.mark.parametrize("spoil", ["table", "outcome"])
def test_a_start_tunes_again_where_the_table_is_gone_or_the_outcome_is_broken(stand_in: Path, spoil: str) -> None:
    tune_once(tuner(stand_in), time.time())
    if spoil == "table":
        (stand_in / "store" / "table.json").unlink()
    else:
        (stand_in / "autotune" / "layer.json").write_text('{"text": ')
    assert tuner(stand_in).read_settled() is None
    assert tune_once(tuner(stand_in), time.time()).is_settled
    assert len(runs(stand_in)) == 2


def test_a_model_of_which_one_layer_failed_is_tried_again(stand_in: Path) -> None:
    (stand_in / "does").write_text("one of two fails")
    outcome = tune_once(tuner(stand_in), time.time())
    assert "no time was left" in outcome.text and tuner(stand_in).read_settled() is None


def test_what_is_needless_is_asked_once(stand_in: Path) -> None:
    (stand_in / "does").write_text("needless")
    assert tune_once(tuner(stand_in), time.time()).text == "not tuned: it is known"
    assert tuner(stand_in).read_settled() is not None


def test_a_tuner_that_is_too_slow_is_killed_and_the_server_starts(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stand_in / "does").write_text("hang")
    monkeypatch.setattr(tuner_process, "GRACE_S", 0.5)
    begun = time.monotonic()
    outcome = tune_once(tuner(stand_in, seconds=1.5), time.time())
    assert time.monotonic() - begun < 6
    assert "did not end within" in outcome.text and not outcome.is_settled
    assert all(map(is_gone, runs(stand_in)))


@pytest.mark.parametrize(
    ("end", "after_s"),
    [
        (signal.SIGTERM, 0.0),
        (signal.SIGKILL, 0.1),
        (signal.SIGKILL, 0.5),
        (signal.SIGTERM, None),
        (signal.SIGKILL, None),
    ],
    ids=["at once", "as it starts", "as it imports", "SIGTERM in the middle", "SIGKILL in the middle"],
)
def test_a_killed_server_leaves_no_tuner_no_lock_and_no_broken_file(
    stand_in: Path, end: signal.Signals, after_s: float | None
) -> None:
    (stand_in / "does").write_text("hang")
    command = [sys.executable, "-c", SERVER, str(stand_in / "autotune" / "layer"), *COMMAND]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + (30.0 if after_s is None else after_s)
    while time.monotonic() < until and not (after_s is None and (stand_in / "hangs").exists()):
        time.sleep(0.02)
    server.send_signal(end)
    server.wait()
    assert all(map(is_gone, runs(stand_in)))
    (stand_in / "does").write_text("tune")
    assert tune_once(tuner(stand_in), time.time()).is_settled
    assert all(map(is_gone, runs(stand_in)))


def test_a_lock_file_that_was_left_behind_locks_nothing(stand_in: Path) -> None:
    (stand_in / "autotune").mkdir()
    (stand_in / "autotune" / "layer.lock").write_text("1")
    assert tune_once(tuner(stand_in), time.time()).is_settled


LAYER = StartingLayer(("--model", "GLM-4.7-Flash"), (1, 64), (0, 1), "NVIDIA H200", "GLM-4.7-Flash")


@pytest.fixture
def store(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(env.STORE, str(stand_in / "own"))
    monkeypatch.setenv(env.AUTOTUNE, "60")
    for name in (env.DISABLE, env.SGLANG_PLUGINS):
        monkeypatch.delenv(name, raising=False)
    return stand_in


def test_the_tuner_gets_the_servers_batch_sizes_and_all_gpus_of_its_ranks(store: Path) -> None:
    autotune.before_load("sglang", lambda: LAYER)
    (line,) = (store / "runs").read_text().splitlines()
    assert '"--gpus", "0,1"' in line and '"--batch-size", "1", "64"' in line and '"--install", "none"' in line
    assert '"--effort", "quick"' in line


def test_a_second_start_starts_no_process_and_says_nothing(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    autotune.before_load("sglang", lambda: LAYER)
    caplog.clear()
    autotune.before_load("sglang", lambda: LAYER)
    assert len(runs(store)) == 1 and caplog.messages == []


def test_a_server_on_another_gpu_of_that_name_uses_the_same_result(store: Path) -> None:
    autotune.before_load("sglang", lambda: LAYER)
    autotune.before_load("sglang", lambda: dataclasses.replace(LAYER, gpus=(2, 3)))
    assert len(runs(store)) == 1


@pytest.mark.parametrize("text", ["yes", "nan", "-1", "0.5", "1e9"])
def test_a_value_that_is_no_time_is_said_in_one_line(
    text: str, store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(env.AUTOTUNE, text)
    autotune.before_load("sglang", lambda: LAYER)
    (line,) = caplog.messages
    assert f"{env.AUTOTUNE}={text}" in line and runs(store) == []


@pytest.mark.parametrize("error", [EngineError("no GPU"), RuntimeError("moved"), AttributeError("renamed")], ids=repr)
def test_whatever_fails_costs_a_line(error: Exception, store: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> StartingLayer:
        raise error

    autotune.before_load("sglang", fails)
    (line,) = caplog.messages
    assert str(error) in line and "passed over" in line


def test_a_store_that_is_a_file_costs_a_line(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(env.STORE, str(store / "does"))
    autotune.before_load("sglang", lambda: LAYER)
    assert len([line for line in caplog.messages if "passed over" in line]) == 1


@pytest.mark.parametrize(("name", "value"), [(env.DISABLE, "1"), (env.SGLANG_PLUGINS, "another")])
def test_switched_off_nothing_is_tuned(name: str, value: str, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    autotune.before_load("sglang", lambda: LAYER)
    assert runs(store) == []


GRAPHS = st.lists(st.integers(1, 2000), max_size=60)


@given(GRAPHS, st.integers(1, 100_000))
def test_every_number_of_tokens_that_can_be_asked_for_is_within_a_factor_of_two(
    graphs: list[int], largest: int
) -> None:
    chosen = choose_batch_sizes(graphs, largest)
    assert list(chosen) == sorted(set(chosen)) and chosen[0] == 1
    assert all(after <= 2 * before for before, after in itertools.pairwise(chosen))
    assert chosen[-1] == min(LARGEST_TOKENS, max([largest, *graphs]))


@given(GRAPHS, st.integers(1, 100_000))
def test_a_run_has_no_more_batch_sizes_than_two_for_each_power_of_two(graphs: list[int], largest: int) -> None:
    assert len(choose_batch_sizes(graphs, largest)) <= 2 * LARGEST_TOKENS.bit_length()


@given(GRAPHS, st.integers(1, 100_000))
def test_the_largest_graph_has_an_entry_of_its_own(graphs: list[int], largest: int) -> None:
    assert max(graphs, default=1) in choose_batch_sizes(graphs, largest)


@given(st.integers(0, 15), st.integers(1, 8), st.integers(1, 8))
def test_ranks_of_one_group_name_the_same_gpus_and_groups_share_none(base: int, step: int, ranks: int) -> None:
    visible = base + 3 * ranks * step
    groups = [
        {group_gpus(base + (group * ranks + rank) * step, base, step, ranks, visible) for rank in range(ranks)}
        for group in range(3)
    ]
    assert all(len(group) == 1 for group in groups)
    named = [gpu for group in groups for gpus in group for gpu in gpus]
    assert len(named) == len(set(named)) == 3 * ranks


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 9), st.integers(0, 9), st.integers(1, 21))
def test_a_rank_always_tunes_on_its_own_gpu_and_on_none_that_it_does_not_see(
    own: int, base: int, step: int, ranks: int, visible: int
) -> None:
    found = group_gpus(own, base, step, ranks, visible)
    assert own in found
    assert found == (own,) or max(found) < visible
