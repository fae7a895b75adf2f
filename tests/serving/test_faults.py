"""Servers look up their layers while others write, and from disks that are full or that nobody may write."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from sglang_moe_ext import env
from sglang_moe_ext.core import Table
from sglang_moe_ext.engines.sglang import table_names
from sglang_moe_ext.tables import merge
from sglang_moe_ext.tables.merge import StoredTable
from tests.engines.installed import REPO_ROOT
from tests.serving.test_table_selection import H200, SHAPE, TRITON, config, known

READERS, WRITES = 8, 60
TOKENS = (1, 64, 4096)

LOOKUP = """
import json, logging, sys
from pathlib import Path
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.serving import table_search, table_selection
from sglang_moe_ext.serving.table_selection import OurEntry
from sglang_moe_ext.serving.table_search import TableDir
from sglang_moe_ext.models.shape_string import parse_shape

root, shape, triton, gpu = Path(sys.argv[1]), parse_shape(sys.argv[2]), sys.argv[3], find_gpu("H200")
lines = []
logging.getLogger("sglang_moe_ext.serving.table_search").addFilter(lambda record: lines.append(record.getMessage()))

def looked_up():
    found = table_search.search(shape, gpu.device_name, gpu, triton, [TableDir("your", root)])
    chosen = [table_selection.select(found, tokens) for tokens in (1, 64, 4096)]
    ours = [it for it in chosen if isinstance(it, OurEntry)]
    return [sorted({it.up.group_m for it in ours}), sorted({it.down.group_m for it in ours if it.down}), len(ours)]
"""
"""The marks of the entries that a layer would run for three numbers of tokens, and for how many it has any."""

READER = """
print("ready", flush=True)
met, reads = set(), 0
while not looked_up()[2]:
    pass
while not (root / "all is written").exists():
    met.add(json.dumps(looked_up()))
    reads += 1
print(json.dumps({"reads": reads, "met": [json.loads(it) for it in met], "lines": lines}))
"""

WRITER = """
import subprocess
from tests.serving import test_faults as tests

def state(mark):
    try:
        tests.put(root, mark)
        return [looked_up(), "written"]
    except Exception as error:
        return [looked_up(), f"{type(error).__name__}: {error}"]

said = {"whole": state(1)}
"""
FULL = """
said["files"] = sorted(map(str, root.rglob("*")))
with (root / "filler").open("wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(512))
    except OSError:
        pass
said["full"] = state(2)
(root / "filler").unlink()
said["files after"] = sorted(map(str, root.rglob("*")))
subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
said["read-only"] = state(3)
print(json.dumps(said))
"""
LIMITED = """
import resource
said["files"] = sorted(map(str, root.rglob("*")))
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
said["full"] = state(2)
said["files after"] = sorted(map(str, root.rglob("*")))
print(json.dumps(said))
"""


def table(mark: int) -> Table:
    """A table all of whose entries carry one mark."""
    return {tokens: config(mark) for tokens in TOKENS}


def put(root: Path, mark: int) -> None:
    """Store the tables of both projections as a tuner does."""
    folder = root / table_names.version_folder(TRITON)
    keys = [table_names.table_key(SHAPE, H200.device_name, down=down) for down in (False, True)]
    up, down = (folder / table_names.file_name(key) for key in keys)
    stored = StoredTable(table(mark), known(table(mark)))
    merge.put({up: stored, down: stored}, pairs=[(up, down)])


def command(code: str, root: Path) -> list[str]:
    return [sys.executable, "-c", LOOKUP + code, str(root), str(SHAPE), TRITON]


@functools.cache
def read_while_writing() -> list[dict[str, Any]]:
    """What each of the readers met while one table took the place of another, again and again."""
    root = Path(tempfile.mkdtemp(prefix="faults_"))
    readers = [
        subprocess.Popen(command(READER, root), stdout=subprocess.PIPE, text=True, cwd=REPO_ROOT)
        for _ in range(READERS)
    ]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(env.STORE, str(root / "store"))
        for mark in range(1, WRITES + 1):
            put(root, mark)
    (root / "all is written").touch()
    said = [reader.communicate(timeout=120)[0] for reader in readers]
    assert [reader.returncode for reader in readers] == [0] * READERS
    return [json.loads(text) for text in said]


def test_readers_meet_more_than_one_table_while_they_are_written() -> None:
    assert len({json.dumps(met) for said in read_while_writing() for met in said["met"]}) > 1


def test_each_answer_while_a_tune_writes_comes_from_a_table_that_was_written_whole() -> None:
    for said in read_while_writing():
        for up, down, found in said["met"]:
            assert (len(up), len(down), found) == (1, 1, len(TOKENS))


def test_no_table_is_passed_over_while_a_tune_writes() -> None:
    assert [said["lines"] for said in read_while_writing()] == [[]] * READERS


@functools.cache
def on_a_disk(kind: str) -> dict[str, Any] | None:
    """What a layer runs, and a tuner is told, on a disk of 48 KiB that fills up; None where none may be mounted."""
    root = Path(tempfile.mkdtemp(prefix="faults_"))
    asked = command(WRITER + LIMITED, root)
    if kind == "mounted":
        mount = 'mount -t tmpfs -o size=48k none "$0" && exec "$@"'
        inside = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(root)]
        if shutil.which("unshare") is None or subprocess.run([*inside, "true"], check=False).returncode != 0:
            return None
        asked = [*inside, *command(WRITER + FULL, root)]
    environment = {**os.environ, env.STORE: str(root / "store")}
    done = subprocess.run(asked, capture_output=True, text=True, cwd=REPO_ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture(params=["mounted", "limited"])
def disk(request: pytest.FixtureRequest) -> dict[str, Any]:
    answer = on_a_disk(request.param)
    if answer is None:
        pytest.skip("no disk may be mounted here")
    return answer


def test_a_table_on_a_disk_with_room_is_used(disk: dict[str, Any]) -> None:
    assert disk["whole"] == [[[1], [1], 3], "written"]


def test_on_a_full_disk_the_table_that_is_there_stays_in_use(disk: dict[str, Any]) -> None:
    assert disk["full"][0] == [[1], [1], 3]


def test_a_full_disk_is_named_to_the_tuner(disk: dict[str, Any]) -> None:
    assert disk["full"][1].startswith("StoreError: cannot write ")


def test_a_full_disk_leaves_no_half_written_file(disk: dict[str, Any]) -> None:
    assert disk["files after"] == disk["files"]


def test_on_a_disk_that_nobody_may_write_the_table_that_is_there_stays_in_use() -> None:
    answer = on_a_disk("mounted")
    if answer is None:
        pytest.skip("no disk may be mounted here")
    assert answer["read-only"][0] == [[1], [1], 3]
    assert "Read-only file system" in answer["read-only"][1]
