"""Does a server with the plugin grow, or fail, under a long load? 64 connections, mixed lengths, cancellations.

usage, from the repository root: python -m benchmarks.real_servers.load [--minutes 30] [--connections 64]
       [--cancelled 0.15] [--sample-s 5] [--stock] [--out FOLDER] [--json FILE]

Each connection sends one request after the other to an SGLang server of a dummy Qwen3-30B-A3B of few layers, which
has CUDA graphs for decode steps, and whose store has tables and kernel plans that nothing ships (`forced_tables`).
A share of the requests is cancelled by closing the connection in the middle of its stream. The resident memory of all
processes of the server and the memory of the GPU are sampled; the slope over the second half is given with its 95 %
interval, by which it is told from noise. `--stock` loads a server without the plugin, to compare with.
Checked: no request fails that was not cancelled, the server is healthy at the end, its log has no error, and by the
lower end of its interval the host's memory grows by less than 1 MiB and the GPU's by less than 1 MiB a minute.
Needs SGLang 0.5.15 and a GPU with 80 GB. The status is 0 where all of that holds.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.real_servers import forced_tables, servers
from benchmarks.real_servers.servers import Setup
from sglang_moe_ext.core import EngineError, MoEExtError, MoEShape
from sglang_moe_ext.e2e.client import prompt

LENGTHS, CPU_LENGTHS = (3, 20, 90, 250, 700, 1500, 4000), (3, 9, 20, 40)
NEW_TOKENS, CPU_NEW_TOKENS = (1, 8, 32, 128), (1, 2, 4)
MOST_GROWTH = 1.0
"""MiB a minute, of the host's memory and of the GPU's."""
GRAPHS = (
    *("--cuda-graph-backend-decode", "full", "--cuda-graph-max-bs-decode", "64"),
    *("--cuda-graph-backend-prefill", "disabled", "--max-running-requests", "64"),
)
SHAPES, CPU_SHAPES = (MoEShape(128, 768, 2048, 8),), (MoEShape(8, 32, 64, 2),)
_START_S, _REQUEST_S, _LEAVE_S = 240.0, 120.0, 60.0
_OUTCOMES = ("answered", "cancelled", "failed")


@dataclass(frozen=True, slots=True)
class Sample:
    """Memory at a time: resident in all processes of the server, and used on its GPU, which may be unknown."""

    minutes: float
    host_mib: float
    gpu_mib: float | None


@dataclass(frozen=True, slots=True)
class Slope:
    """Growth in MiB a minute, with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


@dataclass(slots=True)
class Load:
    """What became of the requests. `failures`: what the first ones said."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, outcome: str, why: str | None = None) -> None:
        with self.lock:
            self.outcomes[outcome] += 1
            if why is not None and len(self.failures) < 10:
                self.failures.append(why)


def slope(points: Sequence[tuple[float, float]]) -> Slope | None:
    """The least-squares slope of values over minutes; None of fewer than eight points.

    Neighbouring samples are alike, which the usual interval takes for certainty: the points are averaged in eight
    groups first, whose errors are nearer to independent.
    """
    groups = 8
    if len(points) < groups:
        return None
    bounds = [len(points) * at // groups for at in range(groups + 1)]
    parts = [points[a:b] for a, b in itertools.pairwise(bounds)]
    xs, ys = ([sum(point[axis] for point in part) / len(part) for part in parts] for axis in (0, 1))
    mean_x, mean_y = sum(xs) / groups, sum(ys) / groups
    spread = sum((x - mean_x) ** 2 for x in xs)
    if spread == 0:
        return None
    value = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    rest = sum((y - mean_y - value * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    half = 2.447 * (rest / (groups - 2) / spread) ** 0.5  # Student's t for 6 degrees of freedom
    return Slope(value, value - half, value + half)


def processes_of(session: int) -> Iterator[int]:
    """The processes of a session, which a server leads."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                    yield int(entry.name)


def host_mib(session: int) -> float:
    """Proportional share where the kernel tells it, so that pages that processes share count once."""
    total = 0
    for process in processes_of(session):
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    return total / 1024


def gpu_mib() -> float | None:
    """Used on the first visible GPU; None where nvidia-smi does not say."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", "-i", gpu, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def send(url: str, body: dict[str, Any], *, cancel_after: int | None) -> str:
    """Ask for a stream, read it to its end, or close the connection behind so many events; how it ended.

    Raises:
        OSError, HTTPException: the connection broke.
        ValueError: the server refused, or streamed an error.
    """
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_REQUEST_S)
    try:
        connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != http.client.OK:
            raise ValueError(f"status {answer.status}: {answer.read(200)!r}")
        if cancel_after == 0:
            return "cancelled"
        events, last = 0, b""
        for line in answer:
            if line.startswith(b"data:") and b"[DONE]" not in line:
                events, last = events + 1, line
            if events == cancel_after:
                return "cancelled"
        if b'"error"' in last or not events:
            raise ValueError(f"the stream ended with {last[:200]!r}")
        return "answered"
    finally:
        connection.close()


def keep_asking(
    url: str, seed: int, asked: argparse.Namespace, load: Load, stop: threading.Event, vocabulary: int
) -> None:
    """One connection's requests, one after the other."""
    choose = random.Random(f"load {asked.seed} {seed}")
    lengths, news = (CPU_LENGTHS, CPU_NEW_TOKENS) if asked.cpu else (LENGTHS, NEW_TOKENS)
    for number in itertools.count():
        if stop.is_set():
            return
        ids = prompt(choose.choice(lengths), f"{seed} {number}", vocabulary)
        new = choose.choice(news)
        sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
        body = {"input_ids": ids, "sampling_params": sampling, "stream": True}
        cancel_after = choose.randrange(new) if choose.random() < asked.cancelled else None
        try:
            load.count(send(url, body, cancel_after=cancel_after))
        except (OSError, http.client.HTTPException, ValueError) as error:
            load.count("failed", f"{type(error).__name__}: {error}")
            stop.wait(1.0)


def run(setup: Setup, asked: argparse.Namespace) -> tuple[Load, list[Sample], list[str]]:
    """Load a server for the time; its samples, and what its log has of errors.

    Raises:
        EngineError: it does not start, or is not healthy at the end.
    """
    more = servers.with_store(setup.out / "store")
    flags = () if setup.is_cpu else GRAPHS
    load, samples, stop = Load(), [], threading.Event()
    with setup.running("load", stock=asked.stock, flags=flags, more=more) as server:
        threads = [
            threading.Thread(
                target=keep_asking,
                args=(server.client.url, seed, asked, load, stop, setup.vocabulary),
                daemon=True,
            )
            for seed in range(asked.connections)
        ]
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        while (passed := time.monotonic() - begun) < asked.minutes * 60:
            samples.append(Sample(passed / 60, host_mib(server.pid), None if setup.is_cpu else gpu_mib()))
            time.sleep(asked.sample_s)
        stop.set()
        until = time.monotonic() + _LEAVE_S
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        if not server.client.is_healthy():
            raise EngineError("the server is not healthy after the load")
        return load, samples, [line for line in server.said().errors if "disconnected" not in line.lower()]


def judge(load: Load, samples: Sequence[Sample], errors: Sequence[str]) -> tuple[dict[str, Slope | None], list[str]]:
    """Slopes of the second half, and what does not hold."""
    half = samples[len(samples) // 2 :]
    slopes = {
        "host": slope([(it.minutes, it.host_mib) for it in half]),
        "GPU": slope([(it.minutes, it.gpu_mib) for it in half if it.gpu_mib is not None]),
    }
    wrong = [
        f"the {name}'s memory grows: {it} MiB a minute" for name, it in slopes.items() if it and it.low > MOST_GROWTH
    ]
    wrong += [f"{load.outcomes['failed']} requests failed: {load.failures[0]}"] if load.outcomes["failed"] else []
    wrong += [] if load.outcomes["answered"] else ["no request was answered"]
    return slopes, wrong + [f"the log: {line}" for line in errors]


def table(load: Load, samples: Sequence[Sample], slopes: dict[str, Slope | None]) -> str:
    """Counts and memory as markdown."""
    counts = " | ".join(str(load.outcomes[it]) for it in _OUTCOMES)
    rows = ["| minutes | answered | cancelled | failed |", "|---:|---:|---:|---:|"]
    rows += [f"| {samples[-1].minutes if samples else 0:.1f} | {counts} |", ""]
    rows += [
        "| memory | MiB at first | at half time | at the end | growth, MiB a minute (95 %) |",
        "|---|---:|---:|---:|---|",
    ]
    for name, of in (("host", "host_mib"), ("GPU", "gpu_mib")):
        values = [getattr(samples[at], of) for at in (0, len(samples) // 2, -1)] if samples else [None] * 3
        told = " | ".join("-" if it is None else f"{it:.0f}" for it in values)
        rows.append(f"| {name} | {told} | {slopes[name] or '-'} |")
    return "\n".join(rows)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = servers.arguments(__doc__, seconds=0)
    arguments.add_argument("--minutes", type=float, default=30.0, help="of load (default 30)")
    arguments.add_argument("--connections", type=int, default=64)
    arguments.add_argument("--cancelled", type=float, default=0.15, help="share of the requests (default 0.15)")
    arguments.add_argument("--sample-s", type=float, default=5.0, help="between samples of memory (default 5)")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--stock", action="store_true", help="without the plugin")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else list(words)
    asked = parser().parse_args(words)
    asked.seconds = asked.seconds or _START_S + asked.minutes * 60 + _LEAVE_S + _REQUEST_S
    with tempfile.TemporaryDirectory() as scratch:
        setup = servers.prepare(asked, Path(scratch), "qwen3_30b_a3b")
        place = forced_tables.here(is_cpu=setup.is_cpu)
        forced_tables.write_store(setup.out / "store", CPU_SHAPES if setup.is_cpu else SHAPES, place)
        load, samples, errors = run(setup, asked)
    slopes, wrong = judge(load, samples, errors)
    print("\n".join(f"WRONG: {line}" for line in wrong) or "every statement holds")
    print(f"\n{table(load, samples, slopes)}")
    document = servers.circumstances(words, "benchmarks.real_servers.load", place)
    told = {name: it and asdict(it) for name, it in slopes.items()}
    results = {"outcomes": dict(load.outcomes), "failures": load.failures, "slopes": told, "wrong": wrong}
    servers.save(asked.json, document | results | {"samples": [asdict(it) for it in samples]})
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MoEExtError as error:
        sys.exit(f"error: {error}")
