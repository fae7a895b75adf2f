"""What an engine says, and which tables it opens, while it is asked for a configuration."""

from __future__ import annotations

import logging
import sys
from typing import Any


class Overheard(logging.Handler):
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
