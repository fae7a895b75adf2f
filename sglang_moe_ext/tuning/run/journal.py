"""The journal of a tuning run, one line for each result. Resuming, replaying and reporting read it."""

from __future__ import annotations

import json
import threading
from collections.abc import Hashable, Sequence
from io import FileIO
from pathlib import Path

from sglang_moe_ext import env
from sglang_moe_ext.core import Failure, MoEExtError, StoreError
from sglang_moe_ext.tuning.bench import messages_json
from sglang_moe_ext.tuning.bench.messages import BenchRequest, BenchResult, Measure
from sglang_moe_ext.tuning.run import journal_reader
from sglang_moe_ext.tuning.run.journal_reader import Circumstances, Recording

NOT_RECORDED = frozenset({"Interrupted", "OutOfMemoryError", "Closed", "CompilePoolUnable"})
"""Kinds of failures of the machine (memory filled by others, a closed pool), not of the candidate: measured again."""


class UnknownRequestError(MoEExtError, LookupError):
    """No replayed journal has a result for this request."""


class Journal:
    """An open journal. Thread-safe. Not process-safe: the caller must hold the lock of the run."""

    def __init__(self, path: Path, so_far: Recording) -> None:
        self.path, self.circumstances = path, so_far.circumstances
        self._results, self._is_finished, self._whole_bytes = so_far.results, so_far.is_finished, so_far.whole_bytes
        self._file: FileIO | None = None
        self._lock = threading.Lock()

    @classmethod
    def create(cls, path: Path, circumstances: Circumstances) -> Journal:
        """A new journal, its first line written.

        Raises:
            StoreError: a file lies there, the disk refuses, or the circumstances are not flat.
        """
        header = journal_reader.header(circumstances)
        try:
            path.touch(exist_ok=False)
        except OSError as error:
            raise cannot_write(path, error) from error
        journal = cls(path, Recording(dict(circumstances), {}, False, 0))
        journal._append(header)
        return journal

    @classmethod
    def open(cls, path: Path) -> Journal:
        """The journal in that file, to go on with; the file changes with the first recorded result.

        Raises:
            StoreError: as `journal_reader.read`, or it is packed.
        """
        if path.suffix == ".gz":
            raise StoreError(f"{path} is packed, which can be replayed but not gone on with: unpack it first")
        return cls(path, journal_reader.read(path))

    @property
    def is_finished(self) -> bool:
        """True where nothing was recorded since `finish`."""
        return self._is_finished

    def known(self) -> list[tuple[BenchRequest, BenchResult]]:
        """Every request with its result, in the order in which they were recorded."""
        with self._lock:
            return list(self._results.values())

    def result(self, request: BenchRequest) -> BenchResult | None:
        """The recorded result, whatever the limit of a BenchGemm."""
        known = self._results.get(messages_json.identity(request))
        return None if known is None else known[1]

    def record(self, request: BenchRequest, result: BenchResult) -> BenchResult:
        """The result as a resumed run reads it: rounded, and the first one where there are two.

        Raises:
            StoreError: the disk refuses, or the result is not one of that request.
        """
        if isinstance(result, Failure) and result.kind in NOT_RECORDED:
            return result
        line = messages_json.to_json(request, result)
        written = messages_json.parse(json.loads(line))
        key = messages_json.identity(request)
        with self._lock:
            if key not in self._results:
                self._append(f"{line}\n".encode())
                self._results[key], self._is_finished = written, False
            return self._results[key][1]

    def through(self, measure: Measure) -> Measure:
        """Read recorded results from the journal; measure the others and record them."""

        def read_or_measure(request: BenchRequest) -> BenchResult:
            known = self.result(request)
            return self.record(request, measure(request)) if known is None else known

        return read_or_measure

    def finish(self) -> None:
        """Write the closing line.

        Raises:
            StoreError: the disk refuses.
        """
        with self._lock:
            if not self._is_finished:
                self._append(journal_reader.END_LINE)
                self._is_finished = True

    def close(self) -> None:
        """Let go of the file; what is recorded afterwards opens it again."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _append(self, line: bytes) -> None:
        """One write of one whole line behind the last whole one, where the next begins too if the disk refuses this."""
        try:
            if self._file is None:
                self._file = FileIO(self.path, "a")
                self._file.truncate(self._whole_bytes)
            written = self._file.write(line)
            while written < len(line):  # a disk that fills up takes a part, and says why it refuses the rest
                written += self._file.write(line[written:])
        except OSError as error:
            self._file = None
            raise cannot_write(self.path, error) from error
        self._whole_bytes += len(line)


def replay(paths: Sequence[Path]) -> Measure:
    """Read results from journals alone, from the first that has one; `.jsonl.gz` too. For use without a GPU.

    The returned function raises UnknownRequestError where none of them has a result.

    Raises:
        StoreError: as `journal_reader.read`, or the journals have different circumstances.
    """
    results: dict[Hashable, tuple[BenchRequest, BenchResult]] = {}
    first: Recording | None = None
    for path in paths:
        found = journal_reader.read(path)
        first = first or found
        if differs := journal_reader.difference(found.circumstances, first.circumstances):
            raise StoreError(f"{path} cannot be replayed together with {paths[0]}: {differs}: replay each alone")
        results = found.results | results

    def read(request: BenchRequest) -> BenchResult:
        try:
            return results[messages_json.identity(request)][1]
        except KeyError:
            named = ", ".join(map(str, paths)) or "no journal"
            raise UnknownRequestError(
                f"{named}: no result for {request}: replay the requests of a recorded run"
            ) from None

    return read


def cannot_write(path: Path, error: OSError) -> StoreError:
    """The error of a disk that refuses a part of a run."""
    return StoreError(
        f"cannot write {path}: {error.strerror or error}; make room and resume, "
        f"or choose another place with {env.STORE}"
    )
