"""Tables of topk_ids as safetensors files: each whole or not there, all together within a bound.

Where there is no room left, a larger table takes the place of the smallest: a tuner wants batches of many tokens. The
folder itself is what is known of it, so processes and runs that share one keep one bound.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

_OURS = re.compile(r"topk_ids_layer\d+_idx\d+_[0-9a-f]{8}\.safetensors")
_TEMPORARY = (".topk_ids_", ".tmp")
"""No name that a reader of captured tables takes; a killed process leaves at most one."""
_ABANDONED_S = 600.0
KEY = "topk_ids"
MOST_BYTES = 1 << 30
"""Of all files of a folder: 1,800 prefills of 16,384 tokens with 9 experts each."""


@dataclass(frozen=True, slots=True)
class Table:
    """Ids of one batch in one layer, int32 in the order of this machine, `width` a token."""

    layer: int
    width: int
    ids: bytes

    @property
    def rows(self) -> int:
        return len(self.ids) // (4 * self.width)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a folder may hold of such files."""

    max_files: int
    most_bytes: int = MOST_BYTES


def encoded(table: Table) -> bytes:
    """The table as a safetensors file has it: size of the header, header, numbers."""
    entry = {"dtype": "I32", "shape": [table.rows, table.width], "data_offsets": [0, len(table.ids)]}
    header = json.dumps({KEY: entry}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + table.ids


def new_run() -> str:
    """What tells the files of this process from those of others, and of a run before it."""
    return secrets.token_hex(4)


def write(folder: Path, table: Table, index: int, run: str) -> Path:
    """Write one file, whole.

    Raises:
        OSError: the folder cannot be made or written.
    """
    return _write(folder, encoded(table), f"topk_ids_layer{table.layer}_idx{index}_{run}.safetensors")


def keep(folder: Path, table: Table, index: int, run: str, bounds: Bounds) -> int:
    """Write the table if there is room, or in the place of smaller ones; returns how large the next has to be.

    Raises:
        OSError: the folder cannot be made or written.
    """
    size = len(encoded(table))
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


def _has_room(files: list[tuple[int, Path]], size: int, bounds: Bounds) -> bool:
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
