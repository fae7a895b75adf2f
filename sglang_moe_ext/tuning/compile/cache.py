"""What is known of binaries from earlier runs, in one SQLite file that many processes may use at once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_moe_ext.core import Failure, Resources
from sglang_moe_ext.kernel_plans import SortedKernelJob
from sglang_moe_ext.tuning.compile.kernel_source import digest_of_sorted_kernels

if TYPE_CHECKING:
    from sglang_moe_ext.tuning.compile.kernel_source import Job, KernelSource

log = logging.getLogger(__name__)

_REFUSALS = frozenset({"CompilationError", "OutOfResources", "UnsupportedLanguageConstruct", "MoEExtError"})
"""Failures that say something of the job; any other may be this machine's, and is tried again next time."""


def default_path() -> Path:
    """`compiled.sqlite` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "sglang_moe_ext" / "compiled.sqlite"


class CompileCache:
    """Results by kernel and job, for all threads. A cache that cannot be used is empty, and says so."""

    def __init__(self, path: Path | None) -> None:
        """`path` None: keep results in memory alone."""
        self._database = self._open(path)
        self._in_use = threading.Lock()

    @staticmethod
    def _open(path: Path | None) -> sqlite3.Connection:
        statement = "CREATE TABLE IF NOT EXISTS compiled (key TEXT PRIMARY KEY, result TEXT NOT NULL)"
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                database = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
                database.execute(statement)
                return database
            except (OSError, sqlite3.Error) as error:
                log.warning("the compile cache %s cannot be used (%s): compiling again what it knows", path, error)
        database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        database.execute(statement)
        return database

    def get(self, source: KernelSource, job: Job) -> Resources | Failure | None:
        try:
            with self._in_use:
                found = self._database.execute("SELECT result FROM compiled WHERE key = ?", (_key(source, job),))
                row = found.fetchone()
            return None if row is None else _parsed(json.loads(row[0]))
        except (sqlite3.Error, ValueError, TypeError, KeyError):
            return None

    def put(self, source: KernelSource, job: Job, result: Resources | Failure) -> None:
        """Keep the result, unless it is a failure that may not come again."""
        if isinstance(result, Failure) and result.kind not in _REFUSALS:
            return
        try:
            with self._in_use:
                self._database.execute(
                    "INSERT OR REPLACE INTO compiled VALUES (?, ?)", (_key(source, job), json.dumps(asdict(result)))
                )
        except sqlite3.Error as error:
            log.warning("the compile cache cannot be written (%s)", error)


def _key(source: KernelSource, job: Job) -> str:
    what: list[object] = [source.fingerprint, asdict(job)]
    if isinstance(job, SortedKernelJob):  # its fields alone do not tell an UpConfig from a DownConfig
        what += [type(job.config).__name__, digest_of_sorted_kernels()]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _parsed(document: dict[str, object]) -> Resources | Failure:
    return Failure(**document) if "kind" in document else Resources(**document)  # type: ignore[arg-type]
