"""A process of ours that is killed leaves none of its children behind, whatever they do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.engines.installed import REPO_ROOT

PROBE = """
from sglang_moe_ext.engines.lookup_probe import engine_alone
probe = engine_alone("SGLang", "tests.engines.hanging_kernel").start()
"""
BENCH = """
from sglang_moe_ext.tuning.bench.worker import BenchProcess
from tests.engines.test_end_with_parent import hang
bench = BenchProcess(hang)
"""
POOL = """
from sglang_moe_ext.tuning.compile.worker import ForkServer
server = ForkServer("tests.engines.hanging_kernel", __import__("os").environ, 60.0)
"""


def hang() -> None:
    note_and_sleep()


def note_and_sleep() -> None:
    with open(os.environ["PIDS"], "a") as pids:
        pids.write(f"{os.getpid()}\n")
    time.sleep(600)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("script", [PROBE, BENCH, POOL], ids=["probe", "bench", "compiler"])
def test_a_killed_process_leaves_no_child(script: str, end: signal.Signals, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    guarded = f"if __name__ == '__main__':\n{''.join(f'    {line}' for line in script.strip().splitlines(True))}\n"
    (tmp_path / "script.py").write_text(f"{guarded}\n    import time; time.sleep(600)\n")
    path = os.pathsep.join((str(tmp_path), str(REPO_ROOT)))
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")], env=os.environ | {"PIDS": str(pids), "PYTHONPATH": path}
    )
    try:
        children = wait_for_pids(pids)
    finally:
        parent.send_signal(end)
        parent.wait()
    until = time.monotonic() + 5
    while any(map(is_running, children)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [pid for pid in children if is_running(pid)]


def wait_for_pids(file: Path) -> list[int]:
    until = time.monotonic() + 60
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5)  # it is past its first lines then
    return [int(line) for line in file.read_text().split()]
