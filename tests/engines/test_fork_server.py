"""The process that children of engine tests are forked from: any worker may hold it, and it ends with the last."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.engines.fork_server import JoinedForkServer
from tests.engines.installed import REPO_ROOT

SERVE = "import sys; from tests.engines import fork_server; fork_server.PRELOADED = (); fork_server.main()"


@contextmanager
def served(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A fork server that has imported nothing, with its socket in that folder."""
    command = [sys.executable, "-c", SERVE, folder / "socket"]
    process = subprocess.Popen(command, cwd=REPO_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


def let_go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


def said(server: JoinedForkServer) -> str:
    out: str = server.run(["-c", "print(sum(map(int, input().split())))"], "4 5", dict(os.environ), 20).stdout
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "server"
    folder.mkdir()
    return folder


def test_it_serves_who_joined_it_when_who_started_it_has_gone(folder: Path) -> None:
    with served(folder) as process:
        joined = JoinedForkServer(str(folder / "socket"))
        let_go(process)
        assert [said(joined), said(joined)] == ["9\n", "9\n"]
        joined.close()


def test_it_ends_with_the_last_that_holds_it_and_leaves_no_file(folder: Path) -> None:
    with served(folder) as process:
        joined = [JoinedForkServer(str(folder / "socket")) for _ in range(2)]
        let_go(process)
        for server in joined:
            assert process.poll() is None
            server.close()
        assert process.wait(20) == 0
    assert not folder.exists()


def test_one_that_has_ended_cannot_be_joined(folder: Path) -> None:
    with served(folder) as process:
        let_go(process)
        process.wait(20)
    with pytest.raises(OSError):
        JoinedForkServer(str(folder / "socket"))
