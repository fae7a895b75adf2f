"""Read the journal of a tuning run: its circumstances, its requests with their results, whether it is finished."""

from __future__ import annotations

import errno
import gzip
import json
import logging
import math
import os
import stat
import zlib
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sglang_moe_ext.core import StoreError
from sglang_moe_ext.tuning.bench import messages_json
from sglang_moe_ext.tuning.bench.messages import BenchRequest, BenchResult

log = logging.getLogger(__name__)

FORMAT = 1
Circumstances = Mapping[str, str | int | float | bool | None]
"""Under what the run measures: shape, GPU, kernel, versions, seed, ... Times are comparable only within equal ones."""
END_LINE = b'{"end":true}\n'
_LONGEST_LINE = 1 << 20
_START_ANEW = "begin a new run, or cut the file off before that line"


@dataclass(frozen=True, slots=True)
class Recording:
    """What a journal says. `whole_bytes` of it are whole lines; what lies behind them was cut short."""

    circumstances: Circumstances
    results: dict[Hashable, tuple[BenchRequest, BenchResult]]
    is_finished: bool
    whole_bytes: int


def read(path: Path) -> Recording:
    """What that journal says; `.gz` is unpacked. A last line that is cut short or garbled counts as not written.

    Raises:
        StoreError: it cannot be read, or is no journal of this format; the message names the file and the line.
    """
    lines = _lines(path)
    first = next(lines, b"")
    results: dict[Hashable, tuple[BenchRequest, BenchResult]] = {}
    recording_of, whole_bytes, is_finished = _header(path, first), len(first), False
    garbled = 0
    for number, line in enumerate(lines, 2):
        if garbled:
            break
        document = _document(line)
        if document is None:
            garbled = number
            continue
        whole_bytes += len(line)
        is_finished = line == END_LINE
        if not is_finished:
            request, result = _parsed(path, number, document)
            results.setdefault(messages_json.identity(request), (request, result))
    else:
        if garbled:
            log.warning("%s:%d: the last line was cut short: its request is asked again", path, garbled)
        return Recording(recording_of, results, is_finished, whole_bytes)
    raise StoreError(f"{path}:{garbled}: expected one JSON object: {_START_ANEW}")


def circumstances_of(path: Path) -> Circumstances:
    """The circumstances of a journal, without reading the rest of it.

    Raises:
        StoreError: it cannot be read, or is no journal of this format.
    """
    return _header(path, next(_lines(path), b""))


def is_finished(path: Path) -> bool:
    """True where there is a journal and its last line closes it."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - len(END_LINE) - 1))
            return file.read().endswith(b"\n" + END_LINE)
    except OSError:
        return False


def difference(recorded: Circumstances, now: Circumstances) -> str | None:
    """The first circumstance that differs, with both values; None where all are equal."""
    for name in {**recorded, **now}:
        there, here = (json.dumps(of[name]) if name in of else "nothing" for of in (recorded, now))
        if there != here:
            return f"{name} is {there} there and {here} now"
    return None


def _lines(path: Path) -> Iterator[bytes]:
    """The lines with their ends; of a line that is too long, pieces without one."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as raw:
            if not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            with gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw as file:
                while line := file.readline(_LONGEST_LINE):
                    yield line
    except (OSError, EOFError, zlib.error) as error:
        raise StoreError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}: begin a new run") from error


def _open_without_waiting(path: str, flags: int) -> int:
    """A pipe that nothing writes to would be waited for without an end."""
    return os.open(path, flags | os.O_NONBLOCK)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _document(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a whole line, or None."""
    try:
        document = _DECODER.decode(line.decode("utf-8")) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _header(path: Path, line: bytes) -> Circumstances:
    document = _document(line)
    match document:
        case {"format": int() as found} if found != FORMAT:
            raise StoreError(f"{path}:1: a journal of format {found}, expected {FORMAT}: begin a new run")
        case {"format": int(), "circumstances": dict() as circumstances} if all(map(_is_flat, circumstances.values())):
            return circumstances
    raise StoreError(
        f"{path}:1: expected the format and the circumstances of a run: name a journal, or begin a new run"
    )


def header(circumstances: Circumstances) -> bytes:
    """The first line of a journal. Raises StoreError where the circumstances are not flat."""
    for name, value in circumstances.items():
        if not _is_flat(value):
            raise StoreError(f"circumstance {name} is {value!r}: expected text, a number, true, false or nothing")
    document = {"format": FORMAT, "circumstances": dict(circumstances)}
    return f"{json.dumps(document, separators=(',', ':'))}\n".encode()


def _is_flat(value: object) -> bool:
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _parsed(path: Path, number: int, document: dict[str, Any]) -> tuple[BenchRequest, BenchResult]:
    try:
        return messages_json.parse(document)
    except StoreError as error:
        raise StoreError(f"{path}:{number}: {error}: {_START_ANEW}") from error
    except RecursionError as error:
        raise StoreError(f"{path}:{number}: nested too deeply: {_START_ANEW}") from error
