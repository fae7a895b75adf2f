"""The real SGLang HTTP server on a CPU, as a process that a test starts, asks and ends."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.engines.installed import ENGINES_DIR

START_S, ANSWER_S = 300.0, 90.0
LIFE_S = 900
"""A server ends by itself after so long, also where the tests that started it were killed."""
FLAGS = (
    *("--device", "cpu", "--host", "127.0.0.1", "--attention-backend", "torch_native"),
    *("--moe-runner-backend", "triton", "--mem-fraction-static", "0.1", "--max-total-tokens", "2048"),
    "--sleep-on-idle",  # its scheduler would keep a core busy while a test waits for another server
)
# Without the fifth, the first request waits for a C++ compiler.
SETTINGS = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "TRITON_INTERPRET": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}
WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
OF_THE_TESTS_PROCESS = ("SGLANG_", "MOE_ON_CPU_", "TRITON_", "PYTHON")


@dataclass(frozen=True, slots=True)
class Site:
    """Where servers run: a user's environment with our wheel in it, a model, and a folder for what servers write."""

    python: Path
    model: Path
    folder: Path


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of the engine's fused-MoE kernel."""

    pid: int
    gemm: str
    config: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Server:
    """A running server of the engine `version`; `launches_file` gets a line for each launch of the kernel."""

    version: str
    process: subprocess.Popen[bytes]
    url: str
    log_file: Path
    launches_file: Path

    def log(self) -> list[str]:
        """All lines it has written, those of its children too."""
        return self.log_file.read_text(errors="replace").splitlines()

    def launches(self) -> list[Launch]:
        """Every launch of the kernel so far. A line without its end is still being written, and is not read."""
        if not self.launches_file.exists():
            return []
        written, _, _ = self.launches_file.read_text().rpartition("\n")
        return [Launch(**json.loads(line)) for line in written.splitlines()]

    def tokens(self, prompt: str, count: int = 4) -> list[int]:
        """The ids that it generates after the prompt, greedily."""
        sampling = {"temperature": 0, "max_new_tokens": count, "ignore_eos": True}
        request = urllib.request.Request(
            f"{self.url}/generate",
            json.dumps({"text": prompt, "sampling_params": sampling}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with WITHOUT_PROXY.open(request, timeout=ANSWER_S) as answer:
                ids: list[int] = json.load(answer)["output_ids"]
        except OSError as error:
            raise self.failure(f"did not answer: {error}") from error
        return ids

    def is_healthy(self) -> bool:
        """True once it has answered its own first request, and serves."""
        try:
            with WITHOUT_PROXY.open(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def wait_until_healthy(self) -> None:
        """Raises AssertionError with the tail of its log where it dies first, or takes too long."""
        end = time.monotonic() + START_S
        while not self.is_healthy():
            if self.process.poll() is not None:
                raise self.failure(f"ended with status {self.process.returncode}")
            if time.monotonic() > end:
                raise self.failure(f"is not healthy after {START_S:.0f} s")
            time.sleep(0.3)

    def kill(self) -> None:
        """End it and its children at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def failure(self, what: str) -> AssertionError:
        """An error with the last lines of the log."""
        tail = "\n".join(line[:300] for line in self.log()[-40:])
        return AssertionError(f"the server of sglang {self.version} {what}; its log ends\n{tail}")


@contextlib.contextmanager
def starting(site: Site, version: str, settings: Mapping[str, str], flags: Sequence[str] = ()) -> Iterator[Server]:
    """A server with these environment variables, healthy later; it and its children are gone afterwards."""
    server = _started(site, version, settings, flags)
    try:
        yield server
    finally:
        server.kill()


def _started(site: Site, version: str, settings: Mapping[str, str], flags: Sequence[str]) -> Server:
    port = _free_port()
    name = f"{version}-{port}"
    log_file, launches_file = site.folder / f"{name}.log", site.folder / f"{name}.jsonl"
    command = [site.python, "-W", "ignore", "-m", "sglang.launch_server", "--model-path", site.model, *FLAGS, *flags]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            ["timeout", "-s", "KILL", str(LIFE_S), *command, "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(site, version) | {"MOE_ON_CPU_LAUNCHES": str(launches_file), **settings},
            cwd=site.folder,
            start_new_session=True,
        )
    return Server(version, process, f"http://127.0.0.1:{port}", log_file, launches_file)


def environment(site: Site, version: str | None) -> dict[str, str]:
    """Of a process in that environment, with that SGLang and nothing of the settings of whoever runs the tests."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(OF_THE_TESTS_PROCESS)}
    places = {
        "PYTHONPATH": "" if version is None else str(ENGINES_DIR / "sglang" / version),
        "TRITON_CACHE_DIR": str(site.folder / "triton"),
        "HOME": str(site.folder),
        "XDG_CACHE_HOME": str(site.folder / "cache"),
        "XDG_DATA_HOME": str(site.folder / "data"),
    }
    return inherited | places | SETTINGS


def _free_port() -> int:
    """One below 30000, to which the engine adds up to 10000 for ports of its own."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = random.randrange(20_000, 30_000)
            probe.bind(("127.0.0.1", port))
            return port
