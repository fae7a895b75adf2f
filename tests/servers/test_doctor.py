"""`sglang-moe-ext doctor --url` asks a real server, in the environment that it was installed into; e2e measures it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from sglang_moe_ext.cli import main
from tests.servers import server as servers
from tests.servers import tables
from tests.servers.server import Server, Site, starting

VERSION = "0.5.15"
TIMEOUT_S = 180


@pytest.fixture(scope="module")
def server(forked_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with starting(forked_site, VERSION, {"SGLANG_MOE_EXT_STORE": str(tmp_path_factory.mktemp("store"))}) as started:
        started.wait_until_healthy()
        yield started


def doctor(site: Site, *arguments: str) -> tuple[list[str], dict[str, Any]]:
    """The lines that it prints for people, and its document."""
    command = site.python.with_name("sglang-moe-ext")
    done = subprocess.run(
        [command, "doctor", "--gpu", "H200", "--batch-size", "1", "--json", *arguments],
        env=servers.environment(site, VERSION) | {"no_proxy": "*"},
        cwd=site.folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr.strip().splitlines(), json.loads(done.stdout)


def test_the_layer_of_a_server_is_examined(server: Server, site: Site) -> None:
    lines, document = doctor(site, "--url", server.url)
    assert lines[0] == f"{server.url}: SGLang {VERSION} serves {site.model} on cpu, --tp-size 1 --ep-size 1"
    assert f"model: {tables.SHAPE}" in lines
    (examined,) = document["examined"]
    assert [finding["gemm"] for finding in examined["findings"]] == ["up", "down"]
    assert examined["reads_tables"] is False  # it runs on a CPU


def test_a_server_is_measured_end_to_end(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    cases = ["--input-lengths", "8", "--prompts", "2", "--batch-size", "2", "--runs", "1", "--decode-input", "4"]
    words = [*cases, "--decode-output", "2", "--vocabulary", "256", "--order", "stock", "plugin", "--engine", "sglang"]
    assert main.main(["e2e", "--urls", server.url, server.url, *words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["compared"]["ttft"]["8"]["plugin_over_stock"] > 0
    assert document["servers"][1]["tokens_per_s"]["2"]["mean"] > 0
