"""A reader sees the old file or the new one: on a full disk, in a locked folder, beside a killed writer, under load."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_moe_ext.core import StoreError, TableError
from sglang_moe_ext.tables import config_table, files, merge
from sglang_moe_ext.tables.merge import StoredTable
from sglang_moe_ext.tables.provenance import Provenance, ProvenanceEntry
from tests.tables import generated

REPO_ROOT = Path(__file__).resolve().parents[2]
READERS = 8
WRITES = 200

KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from sglang_moe_ext.tables import merge
from tests.tables.test_files import made

calls, replace = 0, os.replace
def killed(*arguments):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*arguments)
os.replace = killed
merge.put({Path(sys.argv[1]): made("measured", 128)})
"""

READER = """
import sys
from pathlib import Path
from sglang_moe_ext.tables import config_table

path, stop, reads = Path(sys.argv[1]), Path(sys.argv[2]), 0
print("ready", flush=True)
while not stop.exists():
    widths = {config.block_n for config in config_table.read(path).values()}
    assert len(widths) == 1, f"a table of two writes: {widths}"
    reads += 1
print(reads)
"""


def made(origin: str, block_n: int) -> StoredTable:
    """A table of 40 entries that are all of one width, so that a mixture of two tables shows."""
    table = {m: generated.config(block_n) for m in range(1, 41)}
    return StoredTable(table, Provenance({m: ProvenanceEntry(origin, generated.A_RUN) for m in table}))  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module", autouse=True)
def user_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Locks go to a store of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_MOE_EXT_STORE", str(tmp_path_factory.mktemp("store")))
        yield


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, with room for one table and not for three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"this user may not mount a disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_old_files_and_no_others(small_disk: Path) -> None:
    path = small_disk / "table.json"
    merge.put({path: made("measured", 32)})
    before = contents(small_disk)
    with pytest.raises(StoreError, match="No space left"):
        files.write_together({path: "{}", small_disk / "other.json": "x" * 40_000})
    assert contents(small_disk) == before


def test_a_disk_that_turns_out_full_when_flushed_leaves_the_old_files_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    merge.put({path: made("measured", 32)})
    before = contents(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError):
        merge.put({path: made("measured", 128)})
    assert contents(tmp_path) == before


@pytest.fixture
def locked_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that cannot be written, for root either where root may mount."""
    folder = tmp_path / "locked"
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("root may write everywhere here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_locked_folder_is_refused_by_name_with_the_way_round(locked_folder: Path) -> None:
    with pytest.raises(StoreError, match=f"{locked_folder}.*--output-dir"):
        files.write_together({locked_folder / "table.json": "{}"})


def test_the_folder_that_refuses_is_the_one_that_is_named(locked_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=str(locked_folder)):
        files.write_together({tmp_path / "up.json": "{}", locked_folder / "down.json": "{}"})


def test_one_locked_folder_leaves_the_others_as_they_were(locked_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        files.write_together({tmp_path / "up.json": "{}", locked_folder / "down.json": "{}"})
    assert [path.name for path in tmp_path.iterdir()] == ["locked"]


def test_a_file_where_a_folder_should_be_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "configs").write_text("not a folder")
    with pytest.raises(StoreError, match="configs"):
        files.write_together({tmp_path / "configs" / "triton_3_7_1" / "table.json": "{}"})


def test_a_locked_folder_is_not_writable(locked_folder: Path) -> None:
    assert not files.is_writable(locked_folder / "configs" / "triton_3_7_1")


def test_a_folder_that_could_be_made_is_writable(tmp_path: Path) -> None:
    assert files.is_writable(tmp_path / "configs" / "triton_3_7_1")


def test_a_place_below_a_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "configs").write_text("not a folder")
    assert not files.is_writable(tmp_path / "configs" / "triton_3_7_1")


def test_every_user_can_read_what_was_written(tmp_path: Path) -> None:
    files.write_together({tmp_path / "table.json": "{}"})
    assert (tmp_path / "table.json").stat().st_mode & 0o777 == 0o644


def killed_while_putting(path: Path, at_replacement: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WRITER, str(path), str(at_replacement)],
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("at_replacement", [1, 2], ids=["before the first", "between the two"])
def test_a_writer_killed_before_the_table_took_its_name_leaves_the_old_table(
    tmp_path: Path, at_replacement: int
) -> None:
    path = tmp_path / "table.json"
    old = made("predicted", 32)
    merge.put({path: old})
    killed_while_putting(path, at_replacement)
    assert config_table.read(path) == old.table


def test_what_a_killed_writer_left_is_no_table_of_the_engines(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    killed_while_putting(path, at_replacement=1)
    assert [left.name for left in tmp_path.iterdir() if left.suffix == ".json"] == []


def test_a_reader_never_sees_a_table_half_written(tmp_path: Path) -> None:
    path, stop = tmp_path / "table.json", tmp_path / "stop"
    widths = (32, 64, 128, 256)
    merge.put({path: made("measured", 32)})
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(path), str(stop)],
            env={**os.environ, "PYTHONPATH": str(REPO_ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(READERS)
    ]
    try:
        for reader in readers:
            assert reader.stdout is not None and reader.stdout.readline() == "ready\n"
        for turn in range(WRITES):
            files.write_together({path: config_table.to_json(made("measured", widths[turn % len(widths)]).table)})
    finally:
        stop.touch()
        said = [reader.communicate(timeout=60) for reader in readers]
    assert [(out.strip() != "0", err) for out, err in said] == [(True, "")] * READERS


def test_a_pipe_in_the_place_of_a_file_is_refused_without_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="no regular file"):
        files.read_bounded(pipe)


def test_a_file_that_is_too_large_for_a_table_is_not_read_whole(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(1 << 40)  # a hole: nothing of it is on the disk
    with pytest.raises(TableError, match="larger than"):
        files.read_bounded(large)
