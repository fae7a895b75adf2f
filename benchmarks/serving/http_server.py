"""A real SGLang HTTP server for the benchmark, stock or with the plugin, of this checkout."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.children import environment
from sglang_moe_ext.e2e import server_process
from sglang_moe_ext.e2e.client import Client
from sglang_moe_ext.e2e.server_process import Server

START_S = 240.0
VOCABULARY = 151_936
"""Of Qwen3: prompts are drawn from all of it, so that tokens choose experts alike."""
FLAGS = (
    *("--load-format", "dummy", "--host", "127.0.0.1", "--random-seed", "0", "--log-level", "info"),
    *("--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *("--moe-runner-backend", "triton", "--mem-fraction-static", "0.8", "--disable-radix-cache"),
    *("--cuda-graph-max-bs-decode", "64"),
)
"""No cache of prefixes, and CUDA graphs of decode steps up to the largest batch that is measured; those of prefill are
the server's own. `tools/pack_engine.sh` leaves FlashAttention out, so that attention is Triton's."""
CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Launch:
    """How servers are started: the command before the flag of its port, what is first on PYTHONPATH, and the limit."""

    command: tuple[str, ...]
    site: Path
    folder: Path
    life_s: float
    start_s: float = START_S

    def environment(self, *, stock: bool) -> dict[str, str]:
        """Of a server without or with the plugin, which both find by the metadata in `site`."""
        inherited = os.environ.get("PYTHONPATH")
        path = os.pathsep.join([str(self.site), str(CHECKOUT), *([inherited] if inherited else [])])
        return environment(stock=stock, more={"PYTHONPATH": path})


def command_of(model: Path, more: Sequence[str] = ()) -> tuple[str, ...]:
    """Of a server of that model folder."""
    return (sys.executable, "-W", "ignore", "-m", "sglang.launch_server", "--model-path", str(model), *FLAGS, *more)


@contextlib.contextmanager
def running(launch: Launch, log: Path, *, stock: bool) -> Iterator[Server]:
    """A healthy server; it and all of its children are gone afterwards, and at the latest after `life_s`.

    Raises:
        EngineError: it ends, or takes too long, before it is healthy.
    """
    with server_process.running(
        launch.command,
        launch.environment(stock=stock),
        log,
        lambda url: Client(url, vocabulary=VOCABULARY),
        start_s=launch.start_s,
        life_s=launch.life_s,
        folder=launch.folder,
    ) as server:
        yield server
