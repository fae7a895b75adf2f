"""The e2e command with servers that load no model: started, measured, and ended whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext.cli import main
from sglang_moe_ext.e2e import server_process
from sglang_moe_ext.e2e.client import Client
from sglang_moe_ext.engines.generation import APIS
from sglang_moe_ext.engines.sglang import adapter, installation
from sglang_moe_ext.engines.sglang.installation import SglangInstallation
from sglang_moe_ext.serving import sglang_hooks
from sglang_moe_ext.serving.table_search import TableDir

FAKES = Path(__file__).parents[1] / "e2e"
SMALL = ("--input-lengths", "20", "10", "--prompts", "2", "--batch-size", "2", "--runs", "1", "--decode-output", "8")
QUICK = ("e2e", "--engine", "sglang", *SMALL, "--timeout", "3")
REPO_ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Sets how the server that is started behaves."""
    monkeypatch.setenv("PYTHONPATH", f"{FAKES}{os.pathsep}{REPO_ROOT}")
    monkeypatch.delenv("SGLANG_MOE_EXT_DISABLE", raising=False)
    found = SglangInstallation("0.5.15", tmp_path / "sglang", "3.6.0")
    monkeypatch.setattr(adapter, "find", lambda: found)
    monkeypatch.setattr(installation, "find", lambda: found)
    engines_own = TableDir("SGLang's own", tmp_path, is_engines=True)
    monkeypatch.setattr(sglang_hooks, "table_dirs", lambda _: [engines_own])

    def behave(way: str) -> None:
        monkeypatch.setitem(APIS, "sglang", replace(APIS["sglang"], module="fake_server", words=(way,)))

    return behave


def document(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> dict[str, Any]:
    assert main.main([*QUICK, "--json", *words]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_each_server_is_started_measured_and_held_against_the_others(
    fake: Callable[[str], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fake("serves")
    out = tmp_path / "out"
    found = document(capsys, "--output-dir", str(out), "--", "--model-path", "m")
    assert [(it["server"], it["plugin_active"], it["failure"]) for it in found["servers"]] == [
        ("stock", False, None),
        ("plugin", True, None),
        ("stock", False, None),
    ]
    assert found["compared"]["ttft"].keys() == {"10", "20"}
    assert found["compared"]["tokens_per_s"]["2"]["drift"] is not None
    assert json.loads((out / "e2e.json").read_text()) == found
    assert (out / "e2e.md").read_text().startswith("| input length |")
    assert (out / "server_2_plugin.log").exists()


def test_what_was_measured_is_kept_after_each_server(
    fake: Callable[[str], None], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("serves")
    starts = []
    start = server_process.running

    def stopped_at_the_second(*args: Any, **kwargs: Any) -> Any:
        starts.append(args)
        if len(starts) == 2:
            raise KeyboardInterrupt
        return start(*args, **kwargs)

    monkeypatch.setattr(server_process, "running", stopped_at_the_second)
    words = ("--input-lengths", "10", "--batch-size", "1", "--output-dir", str(tmp_path / "out"), "--", "x")
    assert main.main([*QUICK, *words]) == 130
    kept = json.loads((tmp_path / "out" / "e2e.json").read_text())
    assert [server["server"] for server in kept["servers"]] == ["stock"]
    assert "--output-dir has the turns that were whole" in capsys.readouterr().err


def test_tables_that_tune_wrote_into_the_engine_are_told_as_stock_reads_them(
    fake: Callable[[str], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fake("dies")
    (tmp_path / "triton_3_6_0").mkdir()
    (tmp_path / "triton_3_6_0" / "E=8.provenance.json").touch()
    assert main.main([*QUICK, "--order", "stock", "--", "x"]) == 1
    assert "note: `tune` has written 1 tables into the engine's own folder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("dies", "the server ended with status 1: no GPU"),
        ("fails", "the server answered 500"),
        ("trickles", "the server did not answer a prompt of 10 tokens"),
    ],
)
def test_a_server_that_fails_is_told_and_the_status_says_so(
    fake: Callable[[str], None], capsys: pytest.CaptureFixture[str], way: str, why: str
) -> None:
    fake(way)
    found = document(capsys, "--order", "plugin", "--timeout", "1", "--", "--model-path", "m", status=1)
    assert found["servers"][0]["failure"].startswith(why)


def test_two_servers_that_run_are_asked(
    fake: Callable[[str], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = [sys.executable, str(FAKES / "fake_server.py"), "serves"]
    with server_process.running(command, os.environ, tmp_path / "log", Client, start_s=20, life_s=30) as server:
        found = document(capsys, "--urls", server.client.url, server.client.url)
    assert [(it["failure"], it["plugin_active"]) for it in found["servers"]] == [(None, None)] * 3


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "expected either --urls STOCK PLUGIN, or the arguments of a server after --"),
        (("--urls", "http://a", "http://b", "--", "--tp", "1"), "expected either --urls"),
        (("--urls", "ftp://a", "http://b"), "expected the address of a server"),
        (("--", "--port", "30000"), "--port: leave it out"),
        (("--prompts", "0", "--", "x"), "--prompts 0: expected a number from 1"),
        (("--batch-size", "100000", "--", "x"), "--batch-size 100000: expected numbers from 1 to 4096"),
        (("--timeout", "0", "--", "x"), "--timeout: expected seconds above 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_makes_no_sense_is_refused_before_a_server_is_started(
    words: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([*QUICK, *words]) == 1
    assert why in capsys.readouterr().err


STARTER = """
import sys
from dataclasses import replace
from pathlib import Path
from sglang_moe_ext.cli import main
from sglang_moe_ext.engines.generation import APIS
from sglang_moe_ext.engines.sglang import adapter, installation
found = installation.SglangInstallation("0.5.15", Path("sglang"), "3.6.0")
adapter.find, installation.find = lambda: found, lambda: None
APIS["sglang"] = replace(APIS["sglang"], module="fake_server", words=(sys.argv[1],))
sys.exit(main.main(sys.argv[2:]))
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + 20
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


@pytest.mark.parametrize(
    ("way", "busy", "sent", "status"),
    [
        ("trickles", "child ", signal.SIGINT, 130),
        ("stalls", "together 2", signal.SIGINT, 130),
        ("trickles", "child ", signal.SIGKILL, -9),
    ],
    ids=["Ctrl-C in a stream", "Ctrl-C in a batch", "kill"],
)
def test_no_server_outlives_the_command(
    fake: None, tmp_path: Path, way: str, busy: str, sent: signal.Signals, status: int
) -> None:
    words = [*QUICK, "--timeout", "60", "--output-dir", str(tmp_path / "out"), "--", "x"]
    command = subprocess.Popen([sys.executable, "-c", STARTER, way, *words], stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "server_1_stock.log"
    assert wait_for(lambda: log.exists() and busy in log.read_text())
    child = int(log.read_text().split()[1])
    command.send_signal(sent)
    _, said = command.communicate(timeout=20)
    assert command.returncode == status
    assert wait_for(lambda: not is_alive(child))
    assert "Traceback" not in said
