"""A folder for each tuning run in the user's store: its journal and its binaries, so that it can be gone on with."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import logging
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sglang_moe_ext.core import StoreError
from sglang_moe_ext.store import locks, user_store
from sglang_moe_ext.tuning import recording
from sglang_moe_ext.tuning.journal import Journal, cannot_write
from sglang_moe_ext.tuning.recording import Circumstances

log = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"
FINISHED_KEPT = 20
UNFINISHED_DAYS = 30

_LOCK = "lock"
_NAME = re.compile(r"\d{4}-\d\d-\d\dT\d{6}\.\d{6}Z-[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class Run:
    """A run that this process holds, alone, until it closes it or ends."""

    folder: Path
    journal: Journal
    lock: BinaryIO

    @property
    def triton_cache(self) -> Path:
        """Binaries of this run alone."""
        return self.folder / "triton"

    def finish(self) -> None:
        """Write the closing line and remove the binaries. Raises StoreError where the disk refuses."""
        self.journal.finish()
        shutil.rmtree(self.triton_cache, ignore_errors=True)

    def close(self) -> None:
        """Let others have the run."""
        self.journal.close()
        self.lock.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def begin(circumstances: Circumstances) -> Run:
    """A new run; runs that have had their time are removed.

    Raises:
        StoreError: the user's store cannot be written.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    folder = _root() / f"{now:%Y-%m-%dT%H%M%S.%fZ}-{_digest(circumstances)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        lock = _held(folder)
        run = Run(folder, Journal.create(folder / JOURNAL, circumstances), lock)
        _make_triton_cache(run)
    except StoreError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _remove_old()
    return run


def resumed(circumstances: Circumstances, path: Path | None) -> Run:
    """The run in that folder, or the newest unfinished one under equal circumstances that nobody holds.

    Raises:
        StoreError: there is none, its circumstances differ, another process holds it, or its journal is broken.
    """
    if path is not None:
        return _opened(path.parent if path.name == JOURNAL else path, circumstances)
    candidates = list(_unfinished(circumstances))
    for folder in candidates:
        if not _is_held(folder):
            return _opened(folder, circumstances)
    if candidates:
        raise _in_use(candidates[0])
    raise StoreError(f"no unfinished run under these circumstances in {_root()}: begin a new one")


def unfinished(circumstances: Circumstances) -> Path | None:
    """The folder of the run that `resumed` would take."""
    return next((folder for folder in _unfinished(circumstances) if not _is_held(folder)), None)


def _opened(folder: Path, circumstances: Circumstances) -> Run:
    differs = recording.difference(recording.circumstances_of(folder / JOURNAL), circumstances)
    if differs is not None:
        raise StoreError(f"{folder} cannot be resumed: {differs}; restore that, or begin a new run")
    lock = _held(folder)
    try:
        run = Run(folder, Journal.open(folder / JOURNAL), lock)
        _make_triton_cache(run)
    except StoreError:
        lock.close()
        raise
    return run


def _make_triton_cache(run: Run) -> None:
    try:
        run.triton_cache.mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(run.triton_cache, error) from error


def _held(folder: Path) -> BinaryIO:
    try:
        lock = locks.hold(folder / _LOCK, wait=False)
    except OSError as error:
        raise cannot_write(folder / _LOCK, error) from error
    if lock is None:
        raise _in_use(folder)
    return lock


def _in_use(folder: Path) -> StoreError:
    return StoreError(f"{folder} is being used by another process: wait until it ends, or begin a new run")


def _is_held(folder: Path) -> bool:
    """True where another process or another Run holds it, or nobody can."""
    try:
        _held(folder).close()
    except StoreError:
        return True
    return False


def _root() -> Path:
    try:
        return user_store.root() / "runs"
    except RuntimeError as error:
        raise StoreError(f"no place for runs: {error} Set {user_store.VARIABLE} to a folder") from error


def _digest(circumstances: Circumstances) -> str:
    return hashlib.sha256(recording.header(dict(sorted(circumstances.items())))).hexdigest()[:8]


def _folders() -> list[Path]:
    """The folders of all runs, newest first."""
    try:
        return sorted((it for it in _root().iterdir() if _NAME.fullmatch(it.name)), reverse=True)
    except OSError:
        return []


def _unfinished(circumstances: Circumstances) -> Iterator[Path]:
    """Folders of unfinished runs under equal circumstances, newest first."""
    for folder in _folders():
        if folder.name.endswith(_digest(circumstances)) and not recording.is_finished(folder / JOURNAL):
            with contextlib.suppress(StoreError):
                if recording.difference(recording.circumstances_of(folder / JOURNAL), circumstances) is None:
                    yield folder


def _remove_old() -> None:
    """Finished runs but for the newest, and unfinished ones that nobody came back to; never one that is held."""
    folders = _folders()
    finished = [folder for folder in folders if recording.is_finished(folder / JOURNAL)]
    forgotten = [folder for folder in folders if folder not in finished and _idle_days(folder) > UNFINISHED_DAYS]
    for folder in (*finished[FINISHED_KEPT:], *forgotten):
        _remove(folder)


def _remove(folder: Path) -> None:
    try:
        with _held(folder):
            shutil.rmtree(folder)
    except (OSError, StoreError) as error:
        log.info("an old run stays: %s", error)


def _idle_days(folder: Path) -> float:
    journal = folder / JOURNAL
    try:
        return (time.time() - (journal if journal.exists() else folder).stat().st_mtime) / 86400
    except OSError:
        return 0.0
