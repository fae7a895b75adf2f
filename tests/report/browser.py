"""A headless Chromium, driven over its debugging pipe by the standard library alone."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str | None:
    """The program of the first one on PATH."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab. `events`: every event so far, as the protocol has them."""

    def __init__(self, program: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        child_reads, self._write_end = os.pipe()
        self._read_end, child_writes = os.pipe()
        flags = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}",
        ]  # fmt: skip
        # The browser reads its descriptor 3 and writes its descriptor 4.
        shell = ["bash", "-c", f'exec "$@" 3<&{child_reads} 4>&{child_writes}', "bash", program, *flags, "about:blank"]
        self._process = subprocess.Popen(
            shell, pass_fds=(child_reads, child_writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(child_reads)
        os.close(child_writes)
        self._number, self._rest, self._session = 0, b"", None
        self.events: list[dict[str, Any]] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        os.close(self._write_end)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read_end)
        self._profile.cleanup()

    def _messages(self, until: float) -> Iterator[dict[str, Any]]:
        while time.monotonic() < until:
            line, found, rest = self._rest.partition(b"\0")
            if found:
                self._rest = rest
                yield json.loads(line)
                continue
            ready, _, _ = select.select([self._read_end], [], [], max(0.0, until - time.monotonic()))
            piece = os.read(self._read_end, 1 << 16) if ready else b""
            assert piece or not ready, "the browser ended"
            self._rest += piece
        raise TimeoutError("the browser does not answer")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write_end, json.dumps(message).encode() + b"\0")
        for answer in self._messages(time.monotonic() + 60):
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)
        raise AssertionError("unreachable")

    def open(self, page: Path) -> None:
        """Load the file, and wait until it is loaded."""
        seen = len(self.events)
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events[seen:]):
            self.call("Runtime.evaluate", expression="0")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression, as JSON has it."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def requested(self) -> list[str]:
        """The address of everything that was asked for."""
        sent = (event for event in self.events if event.get("method") == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def complaints(self) -> list[str]:
        """What the console and the log say: a blocked load, an exception of a script."""
        named = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in named]

    def look(
        self, path: Path, *, width: int = 1200, height: int = 900, scheme: str = "light", scale: float = 1
    ) -> None:
        """A picture of the whole page, at that width, on light or dark paper."""
        self.resize(width, height, scheme)
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip={
            "x": 0, "y": 0, "width": width, "height": self.evaluate("document.documentElement.scrollHeight"),
            "scale": scale,
        })  # fmt: skip
        path.write_bytes(base64.b64decode(shot["data"]))

    def resize(self, width: int, height: int, scheme: str) -> None:
        """Show the page in a window of that size, on light or dark paper."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
