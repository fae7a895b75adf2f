"""Checks of several processes on one store: killed writers, and readers beside a writer."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.reliability.files import ROOT
from benchmarks.reliability.judged import Result
from sglang_moe_ext import env

NAMES = ("E=128,N=768,device_name=NVIDIA_H200.json", "E=128,N=768,device_name=NVIDIA_H200_down.json")
FLAGS = ("--engine", "sglang", "--no-compile", "--model", "Qwen3-30B-A3B", "--triton", "3.7.1", "--force", "--quiet")
BLOCKS = (16, 64)
"""BLOCK_SIZE_M of all entries of the first pair of tables, and of the second: a mixed pair shows."""
_READERS = 8


def _write_pair(folder: Path, block_m: int) -> list[str]:
    folder.mkdir(exist_ok=True)
    entry = {"BLOCK_SIZE_M": block_m, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1}
    table = {str(m): {**entry, "num_warps": 4, "num_stages": 3} for m in (1, 64, 4096)}
    for name in NAMES:
        (folder / name).write_text(json.dumps(table))
    return [str(folder / name) for name in NAMES]


def _import(files: list[str], variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "sglang_moe_ext", "import", *files, *FLAGS]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=dict(variables),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def kills(count: int, seed: int, folder: Path) -> Result:
    """`import` killed at a random moment; the next one must succeed, and leave one whole pair and nothing else.

    `refused` counts those that were alive when they were killed.
    """
    chance, result, store = random.Random(seed), Result(), folder / "store"
    variables = {**os.environ, env.STORE: str(store)}
    pairs = [_write_pair(folder / f"pair_{block}", block) for block in BLOCKS]
    for _ in range(2):  # the second as fast as those that follow
        begun = time.monotonic()
        _import(pairs[0], variables).communicate()
        whole_s = time.monotonic() - begun
    for turn in range(count):
        result.tried += 1
        process = _import(pairs[turn % 2], variables)
        time.sleep(chance.uniform(0.3, 1.0) * whole_s)  # what comes before are imports of Python
        if process.poll() is None:
            result.refused += 1
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        result.faults += [f"kill {turn}: {file.name} is torn" for file in _tables(store, "*.json") if _is_torn(file)]
        after = _import(pairs[turn % 2], variables)
        _, said = after.communicate(timeout=60)
        if after.returncode != 0:
            result.faults.append(f"kill {turn}: the next run ended with {after.returncode}: {said[-200:]!r}")
        blocks = {
            entry["BLOCK_SIZE_M"]
            for name in NAMES
            for file in _tables(store, name)
            for entry in json.loads(file.read_bytes()).values()
        }
        if blocks != {BLOCKS[turn % 2]}:
            result.faults.append(f"kill {turn}: the pair has BLOCK_SIZE_M {sorted(blocks)}")
        if left := [path.name for path in store.rglob("*.tmp")]:
            result.faults.append(f"kill {turn}: left behind: {left[:3]}")
    return result


def _tables(store: Path, name: str) -> list[Path]:
    return list((store / "tables").rglob(name))


def _is_torn(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except ValueError:
        return True
    return False


def readers(count: int, seed: int, folder: Path) -> Result:
    """Tables read `count` times by eight processes while one writes them again and again."""
    from sglang_moe_ext.core import TileConfig
    from sglang_moe_ext.tables import config_table, files

    path, done = folder / NAMES[0], multiprocessing.Event()
    texts = [
        config_table.to_json({m: TileConfig(block, 64, 64, 1, 4, 3) for m in range(1, 1 + 64 * (1 + seed % 3))})
        for block in BLOCKS
    ]
    files.write_together({path: texts[0]})

    def write() -> None:
        turn = 0
        while not done.is_set():
            turn += 1
            files.write_together({path: texts[turn % 2]})

    def read(faults: multiprocessing.Queue[str]) -> None:
        for _ in range(count // _READERS):
            try:
                blocks = {entry.block_m for entry in config_table.read(path).values()}
            except Exception as error:  # noqa: BLE001 - that is the fault looked for
                faults.put(f"{type(error).__name__}: {error}")
                continue
            if len(blocks) != 1:
                faults.put(f"a torn table: {sorted(blocks)}")

    said: multiprocessing.Queue[str] = multiprocessing.Queue()
    writer = multiprocessing.Process(target=write)
    reading = [multiprocessing.Process(target=read, args=(said,)) for _ in range(_READERS)]
    for process in (writer, *reading):
        process.start()
    result = Result(tried=count // _READERS * _READERS)
    for process in reading:
        process.join()
        if process.exitcode != 0:
            result.faults.append(f"a reader ended with {process.exitcode}")
    done.set()
    writer.join()
    while not said.empty():
        result.faults.append(said.get())
    return result
