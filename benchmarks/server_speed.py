"""How fast does a real SGLang HTTP server answer with the plugin? A whole dummy model, stock against plugin.

usage, from any folder, with this checkout on PYTHONPATH: python -m benchmarks.server_speed [--order stock plugin stock]
       [--model qwen3_30b_a3b_fp8] [--layers 48] [--runs 7] [--prompts 1024 ...] [--requests 32 64]
       [--in 1024] [--out-tokens 128] [--weights spread|engine] [--seconds 540] [--out FOLDER] [--json]
       [-- FLAGS OF THE SERVER]

Decode alone: --prompts (none) --requests 1 4 32 256 --in 32 --out-tokens 256 -- --cuda-graph-max-bs-decode 256

Servers run one after the other, each in a process group that is killed at the end. Where no table with kernel plans for
this GPU and Triton is known (where no prompt is timed: with plans for few tokens), the layer is tuned first, into
SGLANG_MOE_EXT_STORE or a scratch store. What was measured until then is written to FOLDER/server_speed.json after each
case. Needs SGLang 0.5.15 and a GPU with 80 GB.
The status is 0 where all servers were measured in full, each with the plugin as its name says.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.serving import http_report, http_server, plugin_site
from benchmarks.serving.http_report import Kind, Measured
from benchmarks.serving.http_server import CHECKOUT, Launch
from benchmarks.vs_upstream.report import Place, here
from sglang_moe_ext import env
from sglang_moe_ext.core import EngineError, MoEExtError, MoEShape, Quantization
from sglang_moe_ext.e2e import server_process
from sglang_moe_ext.e2e.server_process import Server
from sglang_moe_ext.few_tokens_config import FewTokensConfig
from sglang_moe_ext.kernel_plans import Plan
from sglang_moe_ext.serving import kernel_selection, sglang_hooks

MODEL = "qwen3_30b_a3b_fp8"
SHAPES = {
    MODEL: MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", (128, 128))),
    "qwen3_30b_a3b": MoEShape(128, 768, 2048, 8),
    "glm_4_7_flash": MoEShape(65, 1536, 2048, 5, fused_shared=1),
}
SHAPE = SHAPES[MODEL]
PROMPTS = (1024, 2048, 4096, 8192, 16_000)
REQUESTS = (32, 64)
BATCH_TOKENS, BATCH_NEW_TOKENS = 1024, 128
WARM_UPS = 2
"""Before the runs that count; the first of them is reported by itself, since it may compile."""
FEWEST_RUNS = 7
TUNED_TOKENS = (1, 32, 64, 512, 1024, 2048, 4096, 8192, 16384)
DECODED_TOKENS = (1, 2, 4, 8, 16, 32, 64, 256)
"""What is tuned where no prompt is timed."""
TUNE_S = 200.0
WEIGHTS = {"spread": "of the size that training starts with", "engine": "of the engine's dummy loader"}
_LEAST_FOR_A_SERVER_S = 75.0

Save = Callable[[], None]


@dataclass(slots=True)
class Clock:
    """How long the whole command may still run."""

    seconds: float
    begun: float = field(default_factory=time.monotonic)

    def left_s(self) -> float:
        return self.seconds - (time.monotonic() - self.begun)


def measure(server: Server, into: Measured, asked: argparse.Namespace, clock: Clock, save: Save) -> None:
    """Every case that there is time for, in order; a case that fails ends it with an error.

    Raises:
        EngineError: a request fails.
    """
    into.start_s = server.start_s
    client = server.client
    for size in asked.prompts:
        if clock.left_s() <= 0:
            raise EngineError(f"no time was left for prompts of {size} tokens")
        warm = [client.first_token_ms(size, seed) for seed in range(WARM_UPS)]
        into.first_ms[size] = warm[0]
        into.ttft_ms[size] = [client.first_token_ms(size, WARM_UPS + run) for run in range(asked.runs)]
        save()
    for requests in asked.requests:
        if clock.left_s() <= 0:
            raise EngineError(f"no time was left for {requests} requests")
        rates = [
            client.batch(requests, asked.tokens_in, asked.tokens_out, seed).tokens_per_s
            for seed in range(asked.batch_runs + 1)
        ]
        into.tokens_per_s[requests] = rates[1:]
        save()


def serve(
    kind: Kind, launch: Launch, log: Path, into: Measured, asked: argparse.Namespace, clock: Clock, save: Save
) -> None:
    """Start a server of that kind, measure it, read its log, end it. What fails is told by `into.failure`."""
    try:
        with http_server.running(launch, log, stock=kind == "stock") as server:
            measure(server, into, asked, clock, save)
    except EngineError as error:
        into.failure = str(error)
    if log.exists():
        into.said = server_process.said_by(log)
    save()


def has_plans(place: Place, shape: MoEShape = SHAPE, *, of_few: bool = False) -> bool:
    """Whether a server here finds a table of ours that runs our own kernels for some batch; `of_few`: of few tokens."""
    folders, triton = sglang_hooks.table_dirs(place.engine), place.engine.triton
    if triton is None:
        return False
    found = kernel_selection.load_plans(shape, place.gpu.device_name, triton, folders)
    kind: Any = FewTokensConfig if of_few else Plan
    return any(isinstance(entry.plan, kind) for entry in found.values())


def tune(model: Path, log: Path, limit_s: float, tokens: Sequence[int] = TUNED_TOKENS) -> str | None:
    """Tune the layer into the store; what went wrong, None where nothing did."""
    command = [sys.executable, "-W", "ignore", "-m", "sglang_moe_ext.tune", "--model", str(model)]
    command += ["--effort", "quick", "--install", "none", "--batch-size", *map(str, tokens)]
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    with log.open("wb") as out:
        try:
            done = subprocess.run(
                ["timeout", "-s", "KILL", f"{limit_s:.0f}", *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path},
                check=False,
            )
        except OSError as error:
            return f"tune did not start: {error}"
    return None if done.returncode == 0 else f"tune ended with status {done.returncode}; its output is in {log}"


def tune_where_needed(
    place: Place, model: Path, out: Path, clock: Clock, shape: MoEShape = SHAPE, *, is_decode: bool = False
) -> str | None:
    """Say in a word what was done; None where tables with plans are known already."""
    if has_plans(place, shape, of_few=is_decode):
        return None
    begun = time.monotonic()
    tokens = DECODED_TOKENS if is_decode else TUNED_TOKENS
    wrong = tune(model, out / "tune.log", min(TUNE_S, clock.left_s()), tokens)
    if wrong is None and not has_plans(place, shape, of_few=is_decode):
        wrong = "tune found no plan of ours that wins"
    return wrong or f"tuned in {time.monotonic() - begun:.0f} s"


def _runs(text: str) -> int:
    number = int(text)
    if number < FEWEST_RUNS:
        raise argparse.ArgumentTypeError(f"{number}: expected {FEWEST_RUNS} or more, for a median")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected 1 or more")
    return number


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--order", nargs="+", choices=["stock", "plugin"], default=["stock", "plugin", "stock"])
    arguments.add_argument("--model", choices=list(SHAPES), default=MODEL)
    arguments.add_argument("--layers", type=_positive, default=48)
    arguments.add_argument("--runs", type=_runs, default=FEWEST_RUNS, help="prompts of each length")
    arguments.add_argument("--batch-runs", type=_positive, default=3, help="batches of each number of requests")
    arguments.add_argument("--prompts", nargs="*", type=_positive, default=list(PROMPTS), metavar="TOKENS")
    arguments.add_argument("--requests", nargs="+", type=_positive, default=list(REQUESTS), metavar="NUMBER")
    arguments.add_argument("--in", dest="tokens_in", type=_positive, default=BATCH_TOKENS, help="tokens of a request")
    arguments.add_argument("--out-tokens", dest="tokens_out", type=_positive, default=BATCH_NEW_TOKENS)
    arguments.add_argument("--weights", choices=list(WEIGHTS), default="spread")
    arguments.add_argument(
        "--seconds", type=float, default=1800.0, help="of the whole command; what is late is left out"
    )
    arguments.add_argument("--out", type=Path, help="keep logs and server_speed.json there")
    arguments.add_argument("--json", action="store_true", help="print the document instead of the table")
    arguments.add_argument("server_flags", nargs="*", metavar="-- FLAGS", help="more flags of the server")
    return arguments


def run(asked: argparse.Namespace, place: Place, scratch: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """All servers in turn; the document. `say` gets the table last, whatever failed."""
    from benchmarks import dummy_model

    clock = Clock(asked.seconds)
    out = (asked.out or scratch).resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault(env.STORE, str(scratch / "store"))
    dummy_model.write(scratch / "model", asked.model, asked.layers)
    plugin_site.write(scratch / "site", spread_weights=asked.weights == "spread")
    shape = SHAPES[asked.model]
    tuned = tune_where_needed(place, scratch / "model", out, clock, shape, is_decode=not asked.prompts)
    say(f"tables: {tuned or 'known already'}")
    servers: list[Measured] = []

    def document() -> dict[str, Any]:
        found = http_report.document(place, asked.layers, WEIGHTS[asked.weights], tuned, servers)
        return {"model": asked.model, **found, "tokens_in": asked.tokens_in, "tokens_out": asked.tokens_out}

    def save() -> None:
        (out / "server_speed.json").write_text(json.dumps(document(), indent=1), encoding="utf-8")

    for number, kind in enumerate(asked.order):
        servers.append(Measured(kind))
        if clock.left_s() < _LEAST_FOR_A_SERVER_S:
            servers[-1].failure = "no time was left for this server"
            continue
        serve(
            kind, launch_of(asked, scratch, clock), out / f"server_{number}_{kind}.log", servers[-1], asked, clock, save
        )
        say(f"{kind}: started in {servers[-1].start_s or 0:.0f} s, {clock.left_s():.0f} s left{_why(servers[-1])}")
    save()
    for part in parts(servers, asked, place):
        say(part)
    return document()


def launch_of(asked: argparse.Namespace, scratch: Path, clock: Clock) -> Launch:
    """Of the model and the site in `scratch`, with no more time than is left."""
    command = http_server.command_of(scratch / "model", asked.server_flags)
    left_s = clock.left_s()
    return Launch(command, scratch / "site", scratch, left_s, min(http_server.START_S, left_s))


def parts(servers: Sequence[Measured], asked: argparse.Namespace, place: Place) -> tuple[str, str, str]:
    """What is printed at the end, the table last."""
    batches = [(requests, asked.tokens_in, asked.tokens_out) for requests in asked.requests]
    return (
        http_report.remarks(servers),
        http_report.header(place, asked.model, asked.layers, asked.runs, asked.batch_runs, WEIGHTS[asked.weights]),
        http_report.table(servers, asked.prompts, batches),
    )


def _why(measured: Measured) -> str:
    return "" if measured.failure is None else f"; {measured.failure}"


def is_whole(document: dict[str, Any]) -> bool:
    """Whether every server was measured in full, and each is what its name says."""
    return all(
        server["failure"] is None and server["plugin_active"] == (server["server"] == "plugin")
        for server in document["servers"]
    )


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else list(words)
    asked = parser().parse_args(words)
    place = here(shlex.join(["python", "-m", "benchmarks.server_speed", *words]))
    stream = sys.stderr if asked.json else sys.stdout
    with tempfile.TemporaryDirectory() as scratch:
        document = run(asked, place, Path(scratch), lambda text: print(f"{text}\n", file=stream, flush=True))
    if asked.json:
        print(json.dumps(document))
    return 0 if is_whole(document) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MoEExtError as error:
        sys.exit(f"error: {error}")
