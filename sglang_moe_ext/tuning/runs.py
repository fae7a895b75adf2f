"""A folder for each tuning run in the user's store: its journal and its binaries, so that it can be gone on with."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sglang_moe_ext.core import StoreError
from sglang_moe_ext.tuning import old_runs, recording, run_folders
from sglang_moe_ext.tuning.journal import Journal, cannot_write
from sglang_moe_ext.tuning.recording import Circumstances
from sglang_moe_ext.tuning.run_folders import BINARIES, JOURNAL


@dataclass(frozen=True, slots=True)
class Run:
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
    folder = run_folders.root() / f"{now:%Y-%m-%dT%H%M%S.%fZ}-{_digest(circumstances)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        lock = run_folders.held(folder)
        run = Run(folder, Journal.create(folder / JOURNAL, circumstances), lock)
        _make_triton_cache(run)
    except StoreError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    old_runs.remove()
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
        if not run_folders.is_held(folder):
            return _opened(folder, circumstances)
    if candidates:
        raise run_folders.in_use(candidates[0])
    raise StoreError(
        f"no unfinished run under these circumstances in {run_folders.root()}: leave --resume out to begin a new one"
    )


def unfinished(circumstances: Circumstances) -> Path | None:
    """The folder of the run that `resumed` would take."""
    return next((folder for folder in _unfinished(circumstances) if not run_folders.is_held(folder)), None)


def _opened(folder: Path, circumstances: Circumstances) -> Run:
    differs = recording.difference(recording.circumstances_of(folder / JOURNAL), circumstances)
    if differs is not None:
        raise StoreError(f"{folder} cannot be resumed: {differs}; restore that, or begin a new run")
    lock = run_folders.held(folder)
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


def _digest(circumstances: Circumstances) -> str:
    return hashlib.sha256(recording.header(dict(sorted(circumstances.items())))).hexdigest()[:8]


def _unfinished(circumstances: Circumstances) -> Iterator[Path]:
    """Folders of unfinished runs under equal circumstances, newest first."""
    for folder in run_folders.newest_first():
        if folder.name.endswith(_digest(circumstances)) and not recording.is_finished(folder / JOURNAL):
            with contextlib.suppress(StoreError):
                if recording.difference(recording.circumstances_of(folder / JOURNAL), circumstances) is None:
                    yield folder
