"""One tuning run for all ranks and servers that want the same layer: a lock, a process with a time limit, an outcome.

Whoever comes first holds an advisory lock and runs the tuner; the kernel frees the lock when the last of the two
processes ends, however it ends, so that there is no stale lock to recognise. The others wait for the lock or the
outcome.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sglang_moe_ext import env
from sglang_moe_ext.core import StoreError, TableError
from sglang_moe_ext.tables import files
from sglang_moe_ext.untrusted import show

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-W", "ignore", "-m", "sglang_moe_ext", "tune")
GRACE_S = 10.0
"""What the tuner may take beyond its seconds, to write tables and to end, before it is killed."""
_TRY_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class TuneOutcome:
    """What came of a run, or why there was none.

    `text`: a line for the log. `when`: seconds since the epoch. `is_settled`: a next start need not try again, as long
    as the `tables` are there.
    """

    text: str
    when: float
    is_settled: bool = False
    tables: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tuner:
    """A run to be done once. `place`: the path of its files, without an ending; `seconds` that it may take."""

    place: Path
    flags: tuple[str, ...]
    seconds: float

    def read_settled(self) -> TuneOutcome | None:
        """The outcome of an earlier run that still holds, without a line to log."""
        found = self.read()
        if found is None or not found.is_settled or not all(map(os.path.exists, found.tables)):
            return None
        return TuneOutcome("", found.when, is_settled=True, tables=found.tables)

    def read(self) -> TuneOutcome | None:
        """The last outcome; None if there is none that can be read."""
        try:
            said = files.read_json(self._file(".json"))
            return TuneOutcome(
                str(said["text"]), float(said["when"]), said["is_settled"] is True, tuple(map(str, said["tables"]))
            )
        except (TableError, KeyError, TypeError, ValueError):
            return None

    def write(self, outcome: TuneOutcome) -> None:
        """Raises StoreError where the store cannot be written."""
        files.write_together({self._file(".json"): json.dumps(asdict(outcome)) + "\n"})

    def hold(self) -> BinaryIO | None:
        """The lock, held until it is closed; None while another has it.

        Raises:
            OSError: the store cannot be written, or its disk knows no locks.
        """
        self.place.parent.mkdir(parents=True, exist_ok=True)
        return files.hold(self._file(".lock"), wait=False)

    def run(self, lock: BinaryIO, limit: float) -> TuneOutcome:
        """Run the tuner until `limit` (time.monotonic) at the latest; it and its children are gone afterwards."""
        left = max(limit - GRACE_S - time.monotonic(), 1.0)
        ours = ("--json", "--for-server", str(os.getpid()), "--deadline", f"{left:.1f}")
        environment = {name: value for name, value in os.environ.items() if name != env.AUTOTUNE}
        with self._file(".out").open("wb") as out, self._file(".log").open("wb") as errors:
            process = subprocess.Popen(
                [*COMMAND, *self.flags, *ours],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                env=environment,
                start_new_session=True,
                pass_fds=(lock.fileno(),),  # its memory on the GPU is in the way of the next one as well
            )
            try:
                status: int | None = process.wait(max(limit - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                status = None
            finally:
                if process.returncode is None:  # an interrupt of the server as well
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return self._outcome_of(status)

    def _outcome_of(self, status: int | None) -> TuneOutcome:
        now, where = time.time(), show(str(self._file(".log")))
        if status is None:
            why = f"the tuner did not end within {self.seconds:.0f} s and {GRACE_S:.0f} s more"
            return TuneOutcome(f"not tuned, {why}; the server starts as before; see {where}", now)
        said = self._document() or {}
        # Of a model whose MoE layers differ, each has a document of its own.
        layers = [layer for layer in said.get("layers", [said]) if isinstance(layer, dict)]
        written = tuple(str(path) for layer in layers for path in layer.get("written", ()))
        error = next((layer["error"] for layer in layers if "error" in layer), None)
        if status != 0 or error is not None or not said:
            why = show(f"the tuner ended with status {status}" if error is None else error)
            return TuneOutcome(f"not tuned: {why}; the server starts as before; see {where}", now, tables=written)
        if not written:
            why = show(", ".join(str(layer.get("needless", "nothing was written")) for layer in layers))
            return TuneOutcome(f"not tuned: {why}", now, is_settled=True)
        sizes = sum(int(layer.get("entries", 0)) for layer in layers)
        text = f"tuned {sizes} batch sizes, once: {show(', '.join(written))}"
        return TuneOutcome(text, now, is_settled=True, tables=written)

    def _document(self) -> Mapping[str, Any] | None:
        try:
            said = files.read_json(self._file(".out"))
        except TableError:
            return None
        return said if isinstance(said, dict) else None

    def _file(self, ending: str) -> Path:
        return self.place.with_name(self.place.name + ending)


def tune_once(tuner: Tuner, asked: float) -> TuneOutcome:
    """What came of the run: of this process's own, or of another's that it waited for.

    `asked`: when this process came (seconds since the epoch). A run that failed after that is not tried again.

    Raises:
        OSError, StoreError: the store cannot be written, or its disk knows no locks.
    """
    limit = time.monotonic() + tuner.seconds + GRACE_S
    while (lock := tuner.hold()) is None:
        if time.monotonic() > limit:
            return TuneOutcome("not tuned: another process still tunes this layer; the server starts as before", asked)
        time.sleep(_TRY_EVERY_S)
    with lock:
        if (found := tuner.read_settled()) is not None:
            return found
        if (found := tuner.read()) is not None and not found.is_settled and found.when >= asked:
            return found
        outcome = tuner.run(lock, limit)
        with contextlib.suppress(StoreError):  # then the others try for themselves
            tuner.write(outcome)
        return outcome
