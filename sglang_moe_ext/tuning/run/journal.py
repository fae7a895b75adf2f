"""The journal of a tuning run, a line an answer: what resuming it, replaying it and reporting on it start from."""

from __future__ import annotations

import json
import threading
from collections.abc import Hashable, Sequence
from io import FileIO
from pathlib import Path

from sglang_moe_ext import env
from sglang_moe_ext.core import Failure, MoEExtError, StoreError
from sglang_moe_ext.tuning.bench import messages_json
from sglang_moe_ext.tuning.bench.messages import Ask, BenchRequest, BenchResult
from sglang_moe_ext.tuning.run import journal_reader
from sglang_moe_ext.tuning.run.journal_reader import Circumstances, Recording

NOT_RECORDED = frozenset({"Interrupted", "OutOfMemoryError", "Closed", "CompilePoolUnable"})
"""Kinds of failures that say something of the machine, whose memory others may fill, and nothing of the candidate: the
question is asked again."""


class UnknownRequestError(MoEExtError, LookupError):
    """No journal that is replayed answers this question."""


class Journal:
    """An open journal. Threads may share it; that no two processes do is for whoever opens it to see to."""

    def __init__(self, path: Path, so_far: Recording) -> None:
        self.path, self.circumstances = path, so_far.circumstances
        self._answers, self._is_finished, self._whole_bytes = so_far.answers, so_far.is_finished, so_far.whole_bytes
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
        """The journal in that file, to go on with; the file changes with the first answer that is recorded.

        Raises:
            StoreError: as of `recording.read`, or it is packed.
        """
        if path.suffix == ".gz":
            raise StoreError(f"{path} is packed, which can be replayed but not gone on with: unpack it first")
        return cls(path, journal_reader.read(path))

    @property
    def is_finished(self) -> bool:
        """True where nothing was recorded since it was closed."""
        return self._is_finished

    def known(self) -> list[tuple[BenchRequest, BenchResult]]:
        """Every question with its answer, in the order of the answers."""
        with self._lock:
            return list(self._answers.values())

    def answer(self, question: BenchRequest) -> BenchResult | None:
        """What is known, whatever the limit of a Screen."""
        known = self._answers.get(messages_json.identity(question))
        return None if known is None else known[1]

    def record(self, question: BenchRequest, answer: BenchResult) -> BenchResult:
        """The answer as a resumed run will read it: rounded, and the first one where there are two.

        Raises:
            StoreError: the disk refuses, or the answer is none to that question.
        """
        if isinstance(answer, Failure) and answer.kind in NOT_RECORDED:
            return answer
        line = messages_json.to_json(question, answer)
        written = messages_json.parse(json.loads(line))
        key = messages_json.identity(question)
        with self._lock:
            if key not in self._answers:
                self._append(f"{line}\n".encode())
                self._answers[key], self._is_finished = written, False
            return self._answers[key][1]

    def through(self, ask: Ask) -> Ask:
        """Answer from the journal what it knows; ask for the rest, and record it."""

        def answered(question: BenchRequest) -> BenchResult:
            known = self.answer(question)
            return self.record(question, ask(question)) if known is None else known

        return answered

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


def replay(paths: Sequence[Path]) -> Ask:
    """Answer from journals alone, the first that knows; `.jsonl.gz` as well. For tests, and studies without a GPU.

    What it gives raises UnknownQuestionError on what none of them knows.

    Raises:
        StoreError: as of `recording.read`, or the journals are of different circumstances.
    """
    answers: dict[Hashable, tuple[BenchRequest, BenchResult]] = {}
    first: Recording | None = None
    for path in paths:
        found = journal_reader.read(path)
        first = first or found
        if differs := journal_reader.difference(found.circumstances, first.circumstances):
            raise StoreError(f"{path} cannot be replayed together with {paths[0]}: {differs}: replay each alone")
        answers = found.answers | answers

    def answered(question: BenchRequest) -> BenchResult:
        try:
            return answers[messages_json.identity(question)][1]
        except KeyError:
            named = ", ".join(map(str, paths)) or "no journal"
            raise UnknownRequestError(f"{named}: no answer to {question}: replay what a run asked") from None

    return answered


def cannot_write(path: Path, error: OSError) -> StoreError:
    """The error of a disk that refuses a part of a run."""
    return StoreError(
        f"cannot write {path}: {error.strerror or error}; make room and resume, "
        f"or choose another place with {env.STORE}"
    )
