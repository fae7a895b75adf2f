"""A real server that captures the routing of its layers, and is killed meanwhile."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from sglang_moe_ext.tuning.bench import captured_routing
from sglang_moe_ext.tuning.bench.captured_routing import CapturedRouting
from tests.servers import tables, tiny_model
from tests.servers.runs import PROMPTS
from tests.servers.server import Server, Site, starting

VERSION = "0.5.20"
LONG_ANSWER, LAUNCHES_OF_ITS_START = 400, 60
WRITTEN_S = 30.0


@dataclass(frozen=True, slots=True)
class Killed:
    """What a server left in the folder that was killed while it generated; `log` until then."""

    folder: Path
    log: list[str]


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:end])
    return len(content) == end + max(entry["data_offsets"][1] for entry in entries.values())


def ask_until_it_ends(server: Server) -> None:
    with contextlib.suppress(AssertionError):
        server.tokens(PROMPTS[1], LONG_ANSWER)


@pytest.fixture(scope="module")
def killed(forked_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("capture") / "topk_ids"
    store = str(tmp_path_factory.mktemp("store"))
    settings = {"SGLANG_MOE_EXT_CAPTURE": f"{folder}:1000", "SGLANG_MOE_EXT_STORE": store}
    with starting(forked_site, VERSION, settings) as server:
        server.wait_until_healthy()
        server.tokens(PROMPTS[1])
        end = time.monotonic() + WRITTEN_S
        while not files_in(folder) and time.monotonic() < end:
            time.sleep(0.05)
        before = len(server.launches())
        asking = threading.Thread(target=ask_until_it_ends, args=(server,), daemon=True)
        asking.start()
        while asking.is_alive() and len(server.launches()) < before + LAUNCHES_OF_ITS_START:
            time.sleep(0.02)
        server.kill()
        asking.join()
        return Killed(folder, server.log())


def test_the_tuner_reads_what_a_killed_server_captured(killed: Killed) -> None:
    source = captured_routing.source(killed.folder, tables.SHAPE)
    (maker,) = source.makers
    assert isinstance(maker, CapturedRouting)
    assert sum(maker.lengths) >= len(PROMPTS[1])


def test_both_layers_are_captured(killed: Killed) -> None:
    layers = {path.name.split("_")[2] for path in files_in(killed.folder)}
    assert layers == {f"layer{number}" for number in range(tiny_model.LAYERS)}


def test_a_killed_server_leaves_whole_files_alone(killed: Killed) -> None:
    assert [path.name for path in files_in(killed.folder) if not is_whole(path)] == []


def test_that_routing_is_captured_is_said_once(killed: Killed) -> None:
    assert len([line for line in killed.log if "sglang-moe-ext captures topk_ids" in line]) == 1
