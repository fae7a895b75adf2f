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

from sglang_moe_ext import env
from sglang_moe_ext.core import StoreError
from sglang_moe_ext.tables import files, user_store
from sglang_moe_ext.tuning.run import journal_reader
from sglang_moe_ext.tuning.run.journal import Journal, cannot_write
from sglang_moe_ext.tuning.run.journal_reader import Circumstances

JOURNAL = "journal.jsonl"
BINARIES = "triton"

_LOCK = "lock"
_NAME = re.compile(r"\d{4}-\d\d-\d\dT\d{6}\.\d{6}Z-[0-9a-f]{8}")


def root() -> Path:
    """The folder of all of them.

    Raises:
        StoreError: the user has no place for it.
    """
    try:
        return user_store.root() / "runs"
    except StoreError as error:
        raise StoreError(f"no place for runs: {error} Set {env.STORE} to a folder") from error


def newest_first() -> list[Path]:
    """The folders of all runs; what else lies there is none."""
    try:
        return sorted((it for it in root().iterdir() if _NAME.fullmatch(it.name)), reverse=True)
    except OSError:
        return []


def hold(folder: Path) -> BinaryIO:
    """The run's lock, held until it is closed.

    Raises:
        StoreError: another holds it, or nobody can.
    """
    try:
        lock = files.hold(folder / _LOCK, wait=False)
    except OSError as error:
        raise cannot_write(folder / _LOCK, error) from error
    if lock is None:
        raise in_use(folder)
    return lock


def in_use(folder: Path) -> StoreError:
    """The error of a run that another process holds."""
    return StoreError(f"{folder} is being used by another process: wait until it ends, or begin a new run")


def is_held(folder: Path) -> bool:
    """True where another process or another Run holds it, or nobody can."""
    try:
        hold(folder).close()
    except StoreError:
        return True
    return False


log = logging.getLogger(__name__)

FINISHED_KEPT = 20
UNFINISHED_DAYS = 30


def remove() -> None:
    """Finished runs but for the newest, unfinished ones that nobody came back to, and the binaries of all but one.

    That one is the newest unfinished run that nobody holds, which is the likeliest to be gone on with; the others
    would compile theirs again. A run that is held stays as it is.
    """
    folders = newest_first()
    finished = [folder for folder in folders if journal_reader.is_finished(folder / JOURNAL)]
    unfinished = [folder for folder in folders if folder not in finished]
    forgotten = [folder for folder in unfinished if _idle_days(folder) > UNFINISHED_DAYS]
    for folder in (*finished[FINISHED_KEPT:], *forgotten):
        _remove(folder, folder)
    resumable = [folder for folder in unfinished if folder not in forgotten and not is_held(folder)]
    for folder in resumable[1:]:
        if (folder / BINARIES).exists():
            _remove(folder, folder / BINARIES)


def _remove(run: Path, what: Path) -> None:
    try:
        with hold(run):
            shutil.rmtree(what)
    except (OSError, StoreError) as error:
        log.info("an old run stays: %s", error)


def _idle_days(folder: Path) -> float:
    journal = folder / JOURNAL
    try:
        return (time.time() - (journal if journal.exists() else folder).stat().st_mtime) / 86400
    except OSError:
        return 0.0


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run that this process holds, alone, until it closes it or ends."""

    folder: Path
    journal: Journal
    lock: BinaryIO

    @property
    def triton_cache(self) -> Path:
        """Binaries of this run alone."""
        return self.folder / BINARIES

    def finish(self) -> None:
        """Write the closing line and remove the binaries. Raises StoreError where the disk refuses."""
        self.journal.finish()
        shutil.rmtree(self.triton_cache, ignore_errors=True)

    def close(self) -> None:
        """Let others have the run."""
        self.journal.close()
        self.lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def begin(circumstances: Circumstances) -> RunFolder:
    """A new run; runs that have had their time are removed.

    Raises:
        StoreError: the user's store cannot be written.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    folder = root() / f"{now:%Y-%m-%dT%H%M%S.%fZ}-{_digest(circumstances)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        lock = hold(folder)
        run = RunFolder(folder, Journal.create(folder / JOURNAL, circumstances), lock)
        _make_triton_cache(run)
    except StoreError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    remove()
    return run


def resume(circumstances: Circumstances, path: Path | None) -> RunFolder:
    """The run in that folder, or the newest unfinished one under equal circumstances that nobody holds.

    Raises:
        StoreError: there is none, its circumstances differ, another process holds it, or its journal is broken.
    """
    if path is not None:
        return _opened(path.parent if path.name == JOURNAL else path, circumstances)
    candidates = list(_unfinished(circumstances))
    for folder in candidates:
        if not is_held(folder):
            return _opened(folder, circumstances)
    if candidates:
        raise in_use(candidates[0])
    raise StoreError(f"no unfinished run under these circumstances in {root()}: leave --resume out to begin a new one")


def unfinished(circumstances: Circumstances) -> Path | None:
    """The folder of the run that `resumed` would take."""
    return next((folder for folder in _unfinished(circumstances) if not is_held(folder)), None)


def _opened(folder: Path, circumstances: Circumstances) -> RunFolder:
    differs = journal_reader.difference(journal_reader.circumstances_of(folder / JOURNAL), circumstances)
    if differs is not None:
        raise StoreError(f"{folder} cannot be resumed: {differs}; restore that, or begin a new run")
    lock = hold(folder)
    try:
        run = RunFolder(folder, Journal.open(folder / JOURNAL), lock)
        _make_triton_cache(run)
    except StoreError:
        lock.close()
        raise
    return run


def _make_triton_cache(run: RunFolder) -> None:
    try:
        run.triton_cache.mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(run.triton_cache, error) from error


def _digest(circumstances: Circumstances) -> str:
    return hashlib.sha256(journal_reader.header(dict(sorted(circumstances.items())))).hexdigest()[:8]


def _unfinished(circumstances: Circumstances) -> Iterator[Path]:
    """Folders of unfinished runs under equal circumstances, newest first."""
    for folder in newest_first():
        if folder.name.endswith(_digest(circumstances)) and not journal_reader.is_finished(folder / JOURNAL):
            with contextlib.suppress(StoreError):
                if journal_reader.difference(journal_reader.circumstances_of(folder / JOURNAL), circumstances) is None:
                    yield folder
