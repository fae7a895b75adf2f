"""The parent's end of the pipe: a child process that is asked one thing at a time, and may die."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_moe_ext import env
from sglang_moe_ext.core import EngineError

ANSWER_S = 540.0
"""A first load compiles for a minute; whatever takes this long hangs."""
_LEAVE_S = 20.0
_POLL_S = 1.0
_TAIL_LINES = 3
_NOT_HANDED_ON = (env.DISABLE, "SGLANG_PLUGINS", env.SGLANG_CONFIG_DIR)
"""What would change which configurations a child finds: each is set by us, or not at all."""


def environment(*, stock: bool, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of a child without or with the plugin; the user's store is inherited."""
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_HANDED_ON}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**kept, **offline, **({env.DISABLE: "1"} if stock else {}), **(more or {})}


def running(module: str) -> list[str]:
    """The command of a child."""
    return [sys.executable, "-W", "ignore", "-m", module]


class Child:
    """A process that answers requests; `log` takes its standard error."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name, self.log, self._heard = name, log, b""
        with log.open("wb") as complaints:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, env=dict(environment)
            )

    def ask(self, do: str, /, **what: Any) -> dict[str, Any]:
        """Its answer.

        Raises:
            EngineError: it raised, died, or said nothing for too long.
        """
        answer = self.answer(do, **what)
        if "error" in answer:
            raise EngineError(f"the {self.name} child cannot {do}: {answer['error']} (log: {self.log})")
        return answer

    def answer(self, do: str, /, **what: Any) -> dict[str, Any]:
        """Its answer, which may be `{"error": ...}`.

        Raises:
            EngineError: it died, or said nothing for too long.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **what}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._died(do) from None
        line = self._line(do)
        try:
            answer = json.loads(line)
        except ValueError:
            raise EngineError(f"the {self.name} child answered {line[:100]!r} to {do}, which is no JSON") from None
        assert isinstance(answer, dict)
        return answer

    def _line(self, do: str) -> bytes:
        assert self._process.stdout is not None
        until = time.monotonic() + ANSWER_S
        while b"\n" not in self._heard:
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise EngineError(f"the {self.name} child did not {do} within {ANSWER_S:.0f} s: {self._tail()}")
            ready, _, _ = select.select([self._process.stdout], [], [], min(left_s, _POLL_S))
            if not ready and self._process.poll() is not None:
                raise self._died(do)  # what it left running may hold the pipe open
            if ready:
                data = os.read(self._process.stdout.fileno(), 1 << 16)
                if not data:
                    raise self._died(do)
                self._heard += data
        line, _, self._heard = self._heard.partition(b"\n")
        return line

    def _died(self, do: str) -> EngineError:
        self.close()
        return EngineError(f"the {self.name} child died ({self._process.returncode}) at {do}: {self._tail()}")

    def _tail(self) -> str:
        """The last lines of its standard error, as one."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()][-_TAIL_LINES:]
        return " | ".join(said) or "it said nothing"

    def close(self) -> None:
        """End it: by the end of its input, or else by force."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):  # it may be gone already
            self._process.stdin.close()
        try:
            self._process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
