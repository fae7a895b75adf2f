"""How the servers of these commands are started: real SGLang, a dummy model, stock or with the plugin, GPU or CPU.

With `--cpu` a command is tried out where there is no GPU, in the environment of tests/servers with its tiny model:
what it prints then is of no engine on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.real_servers import ranks
from benchmarks.serving import http_server, plugin_site
from benchmarks.serving.children import environment
from benchmarks.serving.http_server import CHECKOUT
from sglang_moe_ext import env
from sglang_moe_ext.core import EngineError
from sglang_moe_ext.e2e import server_process
from sglang_moe_ext.e2e.client import Client
from sglang_moe_ext.e2e.server_process import Server
from sglang_moe_ext.engines.adapter import EngineName

NO_GRAPHS = ("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled")
MANY_RANKS = ("--disable-custom-all-reduce", "--enforce-disable-flashinfer-allreduce-fusion")
"""All-reduces are NCCL's: the pack of tools/pack_engine.sh lacks what FlashInfer's need."""
WITHOUT_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
FLAGS = (
    *("--load-format", "dummy", "--host", "127.0.0.1", "--random-seed", "0", "--log-level", "info"),
    *("--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *("--moe-runner-backend", "triton", "--mem-fraction-static", "0.9", "--max-total-tokens", "32768"),
    *("--disable-radix-cache", "--skip-server-warmup"),
)
"""The memory for tokens is limited by their number, so that several servers fit beside each other."""
VLLM_FLAGS = (
    *("--load-format", "dummy", "--host", "127.0.0.1", "--seed", "0", "--enforce-eager", "--max-model-len", "4096"),
    *("--gpu-memory-utilization", "0.4", "--kv-cache-memory-bytes", "1073741824", "--max-num-seqs", "16"),
    *("--attention-backend", "TRITON_ATTN", "--moe-backend", "triton", "--no-enable-prefix-caching"),
)
VLLM_SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
}
CPU_FLAGS = (
    *("--device", "cpu", "--host", "127.0.0.1", "--attention-backend", "torch_native", "--random-seed", "0"),
    *("--moe-runner-backend", "triton", "--mem-fraction-static", "0.1", "--max-total-tokens", "4096"),
    *("--disable-radix-cache", "--skip-server-warmup", "--sampling-backend", "pytorch"),
)
CPU_SETTINGS = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "TRITON_INTERPRET": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}
CPU_VOCABULARY = 256
Answer = TypeVar("Answer")


@dataclass(slots=True)
class Clock:
    """How long the whole command may still run."""

    seconds: float
    begun: float = field(default_factory=time.monotonic)

    def left_s(self) -> float:
        return max(0.0, self.seconds - (time.monotonic() - self.begun))


@dataclass(frozen=True, slots=True)
class Setup:
    """What all servers of a command share. `out` gets their logs and what they write."""

    model: Path
    site: Path
    out: Path
    clock: Clock
    is_cpu: bool = False
    engine: EngineName = "sglang"

    @property
    def vocabulary(self) -> int:
        """Prompts are drawn from so many ids."""
        return CPU_VOCABULARY if self.is_cpu else http_server.VOCABULARY

    def command(self, flags: Sequence[str]) -> list[str]:
        """Of a server, before the flag of its port."""
        if self.engine == "vllm":
            words = ["-m", "vllm.entrypoints.cli.main", "serve", str(self.model), *VLLM_FLAGS, *flags]
            return [sys.executable, "-W", "ignore", *words]
        base = CPU_FLAGS if self.is_cpu else FLAGS
        server = ("sglang.launch_server", "--model-path", str(self.model))
        return [sys.executable, "-W", "ignore", "-m", *server, *base, *flags]

    def environment(self, name: str, *, stock: bool, more: Mapping[str, str]) -> dict[str, str]:
        """Of the server of that name, whose sampled tokens are kept in `record(name)`."""
        record = self.record(name)
        record.mkdir(parents=True, exist_ok=True)
        inherited = os.environ.get("PYTHONPATH")
        path = os.pathsep.join([str(self.site), str(CHECKOUT), *([inherited] if inherited else [])])
        ours = {"PYTHONPATH": path, ranks.RECORD: str(record), "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
        for_cpu = {**CPU_SETTINGS, "MOE_ON_CPU_LAUNCHES": str(self.out / f"{name}.launches")} if self.is_cpu else {}
        of_engine = {**VLLM_SETTINGS, "VLLM_CACHE_ROOT": str(self.out / "cache")} if self.engine == "vllm" else {}
        variables = environment(stock=stock, more={**WITHOUT_MULTICAST, **ours, **of_engine, **for_cpu, **more})
        variables.pop(env.VLLM_PLUGINS, None)
        return variables

    def record(self, name: str) -> Path:
        """The folder of the tokens that each rank of that server sampled."""
        return self.out / "sampled" / name

    def log(self, name: str) -> Path:
        """The log of that server."""
        return self.out / f"{name}.log"

    @contextlib.contextmanager
    def running(
        self, name: str, *, stock: bool, flags: Sequence[str] = (), more: Mapping[str, str] | None = None
    ) -> Iterator[Server]:
        """A healthy server; it and all of its children are gone afterwards, and at the latest when the time is over.

        Raises:
            EngineError: it ends, or takes too long, before it is healthy.
        """
        left_s = self.clock.left_s()
        with server_process.running(
            self.command(flags),
            self.environment(name, stock=stock, more=more or {}),
            self.log(name),
            lambda url: Client(url, vocabulary=self.vocabulary),
            start_s=left_s,
            life_s=left_s,
            folder=self.out,
        ) as server:
            yield server


def gpus_of(number: int, ranks: int, gpus: int | None) -> dict[str, str]:
    """The variable that gives the server of that number its GPUs, of so many; none where all see the same ones."""
    groups = (gpus or ranks) // ranks
    if groups < 2:
        return {}
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = inherited.split(",") if inherited else [str(it) for it in range(gpus or ranks)]
    first = number % groups * ranks
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[first : first + ranks])}


def with_store(store: Path) -> dict[str, str]:
    """The variable that has a server read that store."""
    return {env.STORE: str(store)}


def job(function: Callable[..., Answer], *args: Any, **kwargs: Any) -> Callable[[], Answer]:
    """That call, for `at_once` to make."""
    return functools.partial(function, *args, **kwargs)


def at_once(jobs: Mapping[str, Callable[[], Answer]], *, at_a_time: int) -> dict[str, Answer | EngineError]:
    """What each job returns, or the error that ended it; `at_a_time` run beside each other."""
    stopped = threading.Event()

    def run(job: Callable[[], Answer]) -> Answer | EngineError:
        try:
            return EngineError("not begun") if stopped.is_set() else job()
        except EngineError as error:
            return error

    pool = ThreadPoolExecutor(max_workers=at_a_time)
    try:
        found = {name: pool.submit(run, job) for name, job in jobs.items()}
        return {name: future.result() for name, future in found.items()}
    finally:
        stopped.set()
        pool.shutdown(wait=True)


def arguments(doc: str | None, *, seconds: float, layers: int = 3) -> argparse.ArgumentParser:
    """The flags that all of these commands have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=seconds, help=f"of the whole command (default {seconds:g})")
    parser.add_argument("--layers", type=int, default=layers, help=f"of the dummy model (default {layers})")
    parser.add_argument("--out", type=Path, help="a folder that keeps the logs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--cpu", type=Path, metavar="MODEL", help="try this command out on a CPU with that model")
    return parser


def prepare(asked: argparse.Namespace, scratch: Path, model: str = "glm_4_7_flash") -> Setup:
    """The dummy model and the plugins' folder; what servers write goes to `--out`, or to `scratch`."""
    out = (asked.out or scratch / "out").absolute()
    out.mkdir(parents=True, exist_ok=True)
    plugin_site.write(scratch / "site", spread_weights=asked.cpu is None, more=ranks.ENTRY_POINT)
    folder = scratch / "model"
    if asked.cpu is None:
        from benchmarks import dummy_model

        dummy_model.write(folder, model, asked.layers)
    else:
        folder = asked.cpu.absolute()
    return Setup(folder, scratch / "site", out, Clock(asked.seconds), is_cpu=asked.cpu is not None)


def circumstances(words: Sequence[str], module: str, place: Any) -> dict[str, Any]:
    """GPU, engines, Triton, date and command of results."""
    import datetime

    from sglang_moe_ext.engines.sglang import installation
    from sglang_moe_ext.engines.vllm import installation as vllm_installation

    engines = {"sglang": installation.find(), "vllm": vllm_installation.find()}
    return {
        "command": " ".join(["python", "-m", module, *words]),
        "gpu": place.device_name,
        "engines": [f"{name} {it.version_text}" for name, it in engines.items() if it is not None],
        "triton": place.triton,
        "date": datetime.date.today().isoformat(),
    }


def save(path: Path | None, document: Mapping[str, Any]) -> None:
    """Where `--json` says, if it does."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
