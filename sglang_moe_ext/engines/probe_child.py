"""The child side of a lookup probe: import the engine, read one request from stdin, print the answer as JSON."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from sglang_moe_ext.core import MoEExtError

Loaded = TypeVar("Loaded")


def answer_stdin(load: Callable[[], Loaded], look_up: Callable[[Loaded, dict[str, Any]], dict[str, Any]]) -> int:
    """The exit status of a child. The engine is imported before the request comes, which may be a minute later."""
    try:
        loaded = load()
        print(json.dumps(look_up(loaded, json.load(sys.stdin))))
    except MoEExtError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


class LogCapture(logging.Handler):
    """The lines that a logger gets from now on, and the JSON files that the process opens, whatever is said of them."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self._opened: list[str] = []
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        sys.addaudithook(self._note)

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(self._opened))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(".json"):
            self._opened.append(str(arguments[0]))
