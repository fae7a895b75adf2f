"""What is removed of earlier runs, so that the user's store does not grow for ever."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

from sglang_moe_ext.core import StoreError
from sglang_moe_ext.tuning import recording, run_folders
from sglang_moe_ext.tuning.run_folders import BINARIES, JOURNAL

log = logging.getLogger(__name__)

FINISHED_KEPT = 20
UNFINISHED_DAYS = 30


def remove() -> None:
    """Finished runs but for the newest, unfinished ones that nobody came back to, and the binaries of all but one.

    That one is the newest unfinished run that nobody holds, which is the likeliest to be gone on with; the others
    would compile theirs again. A run that is held stays as it is.
    """
    folders = run_folders.newest_first()
    finished = [folder for folder in folders if recording.is_finished(folder / JOURNAL)]
    unfinished = [folder for folder in folders if folder not in finished]
    forgotten = [folder for folder in unfinished if _idle_days(folder) > UNFINISHED_DAYS]
    for folder in (*finished[FINISHED_KEPT:], *forgotten):
        _remove(folder, folder)
    resumable = [folder for folder in unfinished if folder not in forgotten and not run_folders.is_held(folder)]
    for folder in resumable[1:]:
        if (folder / BINARIES).exists():
            _remove(folder, folder / BINARIES)


def _remove(run: Path, what: Path) -> None:
    try:
        with run_folders.held(run):
            shutil.rmtree(what)
    except (OSError, StoreError) as error:
        log.info("an old run stays: %s", error)


def _idle_days(folder: Path) -> float:
    journal = folder / JOURNAL
    try:
        return (time.time() - (journal if journal.exists() else folder).stat().st_mtime) / 86400
    except OSError:
        return 0.0
