"""Real routing for the tuner: topk_ids of a running server, written beside it where the user asks for them."""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import secrets
import struct
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from sglang_moe_ext import env
from sglang_moe_ext.engines.sglang import routing_hook

_OURS = re.compile(r"topk_ids_layer\d+_idx\d+_[0-9a-f]{8}\.safetensors")
_TEMPORARY = (".topk_ids_", ".tmp")
"""No name that a reader of captured tables takes; a killed process leaves at most one."""
_ABANDONED_S = 600.0
KEY = "topk_ids"
MOST_BYTES = 1 << 30
"""Of all files of a folder: 1,800 prefills of 16,384 tokens with 9 experts each."""


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """Ids of one batch in one layer, int32 in the order of this machine, `width` a token."""

    layer: int
    width: int
    ids: bytes

    @property
    def rows(self) -> int:
        return len(self.ids) // (4 * self.width)


@dataclass(frozen=True, slots=True)
class FolderBounds:
    """What a folder may hold of such files."""

    max_files: int
    most_bytes: int = MOST_BYTES


def encode(table: RoutingTable) -> bytes:
    """The table as a safetensors file has it: size of the header, header, numbers."""
    entry = {"dtype": "I32", "shape": [table.rows, table.width], "data_offsets": [0, len(table.ids)]}
    header = json.dumps({KEY: entry}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + table.ids


def new_run() -> str:
    """What tells the files of this process from those of others, and of a run before it."""
    return secrets.token_hex(4)


def write(folder: Path, table: RoutingTable, index: int, run: str) -> Path:
    """Write one file, whole.

    Raises:
        OSError: the folder cannot be made or written.
    """
    return _write(folder, encode(table), f"topk_ids_layer{table.layer}_idx{index}_{run}.safetensors")


def keep(folder: Path, table: RoutingTable, index: int, run: str, bounds: FolderBounds) -> int:
    """Write the table if there is room, or in the place of smaller ones; returns how large the next has to be.

    Raises:
        OSError: the folder cannot be made or written.
    """
    size = len(encode(table))
    files = _ours(folder)
    while files and not _has_room(files, size, bounds):
        smallest, path = files[0]
        if smallest >= size:
            return smallest
        path.unlink(missing_ok=True)
        del files[0]
    if not _has_room(files, size, bounds):
        return bounds.most_bytes
    files.append((size, write(folder, table, index, run)))
    return min(files)[0] if len(files) >= bounds.max_files else 0


def clear_abandoned(folder: Path) -> None:
    """Remove what killed processes left half-written, and nothing that another may still be writing."""
    start, end = _TEMPORARY
    for path in folder.glob(f"{start}*{end}"):
        found = _stat(path)
        if found is not None and time.time() - found.st_mtime > _ABANDONED_S:
            path.unlink(missing_ok=True)


def _ours(folder: Path) -> list[tuple[int, Path]]:
    """(size in bytes, path), the smallest first."""
    if not folder.is_dir():
        return []
    found = ((_stat(path), path) for path in folder.iterdir() if _OURS.fullmatch(path.name))
    return sorted((stat.st_size, path) for stat, path in found if stat is not None)


def _stat(path: Path) -> os.stat_result | None:
    """None where another process has put a larger file in its place."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _has_room(files: list[tuple[int, Path]], size: int, bounds: FolderBounds) -> bool:
    return len(files) < bounds.max_files and sum(held for held, _ in files) + size <= bounds.most_bytes


def _write(folder: Path, content: bytes, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    start, end = _TEMPORARY
    descriptor, temporary = tempfile.mkstemp(prefix=start, suffix=end, dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, folder / name)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
    return folder / name


log = logging.getLogger(__name__)

DEFAULT_FILES = 200
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_MOST_WAITING_BYTES = 128 << 20
"""Host memory for batches that are not written yet; 90 layers of 16,384 tokens with 9 experts are 53 MB."""


@dataclass(frozen=True, slots=True)
class CaptureRequest:
    """What the user wants captured; `folder` is absolute, batches of fewer than `min_tokens` are left out."""

    folder: Path
    max_files: int = DEFAULT_FILES
    min_tokens: int = 1


def parse_request(environ: Mapping[str, str]) -> CaptureRequest | None:
    """What DIR[:max_files][:min_tokens] says; None where it is not set, and, with a warning, where it makes no sense.

    A colon after the last slash begins a number. So `/runs/a:b/ids:50` is the folder `/runs/a:b/ids`, 50 files of it;
    a folder whose own name has a colon is written with a slash behind it.
    """
    value = environ.get(env.CAPTURE, "")
    if not value:
        return None
    parents, slash, last = value.rpartition("/")
    name, *numbers = last.split(":")
    folder = parents + slash + name
    if not folder or len(numbers) > 2 or not all(map(_NUMBER.fullmatch, numbers)):
        log.warning(
            "%s=%s: expected DIR[:max_files][:min_tokens], both from 1 on; no routing is captured", env.CAPTURE, value
        )
        return None
    try:
        return CaptureRequest(Path(folder).absolute(), *map(int, numbers))
    except OSError as error:  # the folder that this process runs in is gone
        log.warning("%s=%s: %s; no routing is captured", env.CAPTURE, value, error)
        return None


def install(runner_module: ModuleType, wish: CaptureRequest) -> bool:
    """Watch the engine's MoE layers; False, and one line, where this engine has them otherwise."""
    reason = routing_hook.obstacle(runner_module)
    if reason is not None:
        log.warning("sglang-moe-ext captures no routing: %s; this SGLang is not supported yet", reason)
        return False
    if not routing_hook.is_watched(runner_module):
        routing_hook.watch(runner_module, Recorder(wish))
        log.info(
            "sglang-moe-ext captures topk_ids of batches of %d tokens or more, at most %d files, into %s; %s",
            wish.min_tokens,
            wish.max_files,
            wish.folder,
            routing_hook.UNSEEN,
        )
    return True


class Recorder:
    """Takes batches from the thread that launches the model, and writes them from one of its own."""

    def __init__(self, wish: CaptureRequest) -> None:
        self.dropped = 0
        self._wish = wish
        self._bounds = FolderBounds(wish.max_files)
        self._waiting: queue.SimpleQueue[routing_hook.RoutingBatch] = queue.SimpleQueue()
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._must_exceed = 0
        self._stopped = False
        self._writer: threading.Thread | None = None

    def wants(self, rows: int, size_bytes: int) -> bool:
        """True for a batch that would be kept, as far as is known."""
        return not self._stopped and rows >= self._wish.min_tokens and size_bytes > self._must_exceed

    def take(self, batch: routing_hook.RoutingBatch) -> None:
        """Have it written, unless too much waits for that already."""
        with self._lock:
            is_too_much = self._waiting_bytes + batch.size_bytes > _MOST_WAITING_BYTES
            if not is_too_much:
                self._waiting_bytes += batch.size_bytes
        if is_too_much:
            self.dropped += 1
            if self.dropped == 1:
                log.warning("%s is written slower than batches come: some are left out", self._wish.folder)
            return
        self._waiting.put(batch)
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name="sglang-moe-ext capture", daemon=True)
            self._writer.start()

    def stop(self, why: str) -> None:
        """Take no more; `why` is said once, and nothing where it is empty."""
        if why and not self._stopped:
            log.warning("sglang-moe-ext captures no more routing: %s", why)
        self._stopped = True

    def _write(self) -> None:
        run, index = new_run(), 0
        try:
            clear_abandoned(self._wish.folder)
            while not self._stopped:
                batch = self._waiting.get()
                width, ids = batch.rows()
                if ids:
                    table = RoutingTable(batch.layer, width, ids)
                    self._must_exceed = keep(self._wish.folder, table, index, run, self._bounds)
                    index += 1
                with self._lock:
                    self._waiting_bytes -= batch.size_bytes
        except Exception as error:
            self.stop(f"{self._wish.folder}: {error}")
            self._waiting = queue.SimpleQueue()
