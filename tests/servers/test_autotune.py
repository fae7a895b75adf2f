"""Two real servers that start at once and want the same layer tuned, and are ended in the middle of it.

Measuring is stood for by a process that hangs, since there is no GPU.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.servers import stand_in_tuner
from tests.servers.server import START_S, Site, starting

VERSION = "0.5.15"


@dataclass(frozen=True, slots=True)
class Ended:
    """`at_first`: runs while both servers waited; `then`: runs once the first had been ended by SIGTERM.

    `left`: process ids of tuners that were there when both servers were gone.
    """

    at_first: list[tuple[int, list[str]]]
    then: list[tuple[int, list[str]]]
    left: list[int]


def wait_until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + START_S
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def ended(forked_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("autotune")
    settings = stand_in_tuner.settings(folder, "hang")

    def runs() -> list[tuple[int, list[str]]]:
        return stand_in_tuner.runs(folder)

    with starting(forked_site, VERSION, settings) as one, starting(forked_site, VERSION, settings) as other:
        servers = (one, other)
        wait_until(lambda: all(any("tunes" in line for line in it.log()) for it in servers), "both came")
        wait_until(lambda: bool(runs()), "one runs the tuner")
        time.sleep(0.5)
        at_first = runs()
        first = next(it for it in servers if _log_of(at_first[0]) == it.log_file)
        os.kill(first.process.pid, signal.SIGTERM)
        wait_until(lambda: len(runs()) > 1, "the other takes over")
        then = runs()
        for server in servers:
            server.kill()
    end = time.monotonic() + 5
    while any(is_running(pid) for pid, _ in then) and time.monotonic() < end:
        time.sleep(0.05)
    return Ended(at_first, then, [pid for pid, _ in then if is_running(pid)])


def _log_of(run: tuple[int, list[str]]) -> Path:
    """The log of the server that a run is for: what its rank writes to."""
    rank = run[1][run[1].index("--for-server") + 1]
    return Path(os.readlink(f"/proc/{rank}/fd/1"))


def test_of_two_servers_that_start_at_once_one_tunes(ended: Ended) -> None:
    assert len(ended.at_first) == 1


def test_the_other_takes_over_when_the_first_is_ended(ended: Ended) -> None:
    assert len(ended.then) == 2
    assert _layer(ended.then[0]) == _layer(ended.then[1])


def test_no_tuner_outlives_its_server(ended: Ended) -> None:
    assert ended.left == []


def test_the_batch_sizes_are_those_of_the_server(ended: Ended) -> None:
    flags = ended.then[0][1]
    sizes = flags[flags.index("--batch-size") + 1 : flags.index("--json")]
    assert sizes[0] == "1" and len(sizes) > 8


def _layer(run: tuple[int, list[str]]) -> list[str]:
    return run[1][: run[1].index("--json")]
