"""Prints values and reads files of strangers: of a server, a checkpoint, a captured file, a table, an error."""

from __future__ import annotations

import errno
import os
import reprlib
import stat

LIMIT = 200
"""Characters of one printed value, as the default of `show`."""
_MOST_BITS = 64


class _BoundedRepr(reprlib.Repr):
    """A repr whose cost does not grow with the value."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = limit

    def repr_int(self, value: int, _level: int) -> str:
        # repr() of an integer beyond 4300 digits raises
        return str(value) if value.bit_length() <= _MOST_BITS else f"an integer of {value.bit_length()} bits"


def show(value: object, limit: int = LIMIT) -> str:
    r"""The value on one printable line of at most `limit` characters.

    A text is shown without quotes, an exception by its message, anything else by a bounded repr. Line ends, colour
    codes, marks that turn the direction of writing and lone surrogates are written as escapes.

    >>> show("E=8\n\x1b[31mred")
    'E=8\\n\\x1b[31mred'
    """
    text = _text(value, limit)
    escaped = "".join(map(_escape, text[:limit]))
    if len(text) <= limit and len(escaped) <= limit:
        return escaped
    mark = f"... ({len(text)} characters)"
    return (escaped[: max(0, limit - len(mark))] + mark)[:limit]


def _text(value: object, limit: int) -> str:
    match value:
        case str():
            return value
        case bytes():
            return value[: limit + 1].decode("utf-8", "backslashreplace")
        case BaseException():
            return _message(value)
        case _:
            return _BoundedRepr(limit).repr(value)


def _message(error: BaseException) -> str:
    try:
        return str(error) or type(error).__name__
    except Exception:
        return type(error).__name__


def _escape(letter: str) -> str:
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")


def read_regular_file(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """The content of a file that is one: a pipe or a device might never end.

    Raises:
        OSError: it cannot be read, is no regular file, or has more bytes; `strerror` says which.
    """
    # without O_NONBLOCK, opening a pipe waits for somebody to write into it
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {most_bytes >> 20} MiB", os.fspath(path))
    return content
