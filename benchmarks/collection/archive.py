"""Pack what a collection made into two small files, and take it out again: the machine that made it goes away."""

from __future__ import annotations

import tarfile
from pathlib import Path

from sglang_moe_ext.core import MoEExtError

RESULTS, TABLES, JOURNALS = "results.jsonl", "tables.tar.xz", "journals.tar.xz"
ROWS = "rows"
"""The folder with a store for each row."""
_MOST_BYTES = 1 << 30
"""Of all files of an archive together."""


def pack(out: Path) -> None:
    """Write `tables.tar.xz` (tables, kernel plans, provenance) and `journals.tar.xz` beside the results."""
    files = sorted(path for path in (out / ROWS).rglob("*") if path.is_file())
    _write(out / TABLES, out, [path for path in files if path.suffix == ".json" and "tables" in path.parts])
    _write(out / JOURNALS, out, [path for path in files if path.name == "journal.jsonl"])


def _write(archive: Path, root: Path, files: list[Path]) -> None:
    staged = archive.with_suffix(".tmp")
    with tarfile.open(staged, "w:xz") as packed:
        for path in files:
            packed.add(path, path.relative_to(root).as_posix())
    staged.replace(archive)


def unpack(archive: Path, into: Path) -> None:
    """Take out all files.

    Raises:
        MoEExtError: it is no such archive, or holds something else than files below `rows`, or too much.
    """
    try:
        with tarfile.open(archive, "r:xz") as packed:
            members = packed.getmembers()
            odd = next((it.name for it in members if not it.isfile() or not it.name.startswith(f"{ROWS}/")), None)
            if odd is not None:
                raise MoEExtError(f"{archive} holds {odd!r}: expected files below {ROWS}/")
            if sum(it.size for it in members) > _MOST_BYTES:
                raise MoEExtError(f"{archive} holds more than {_MOST_BYTES >> 20} MiB")
            packed.extractall(into, members, filter="data")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise MoEExtError(f"{archive} cannot be unpacked: {error}") from error
