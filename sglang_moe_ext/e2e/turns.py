"""Let each server have its turn: one that is started for it and ended, or one that runs at an address."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext import env
from sglang_moe_ext.core import EngineError
from sglang_moe_ext.e2e import server_process
from sglang_moe_ext.e2e.client import Client
from sglang_moe_ext.e2e.measure import Cases, Kind, Measurer, Progress, Turn, measure
from sglang_moe_ext.engines.sglang.server_client import Server
from sglang_moe_ext.untrusted import show

_LIFE_S = 86_400.0
_MODELS_S = 30.0


@dataclass(frozen=True, slots=True)
class Launched:
    """Servers with these arguments, each of which may take `start_s` until it is healthy; `logs`: their folder."""

    arguments: tuple[str, ...]
    start_s: float
    logs: Path


@dataclass(frozen=True, slots=True)
class Addresses:
    """Servers that run already, by kind."""

    urls: Mapping[Kind, str]


def take_turns(
    servers: Launched | Addresses,
    order: Sequence[Kind],
    cases: Cases,
    client: Client,
    measurer: Callable[[Client], Measurer],
    progress: Progress,
    keep: Callable[[list[Turn]], None],
) -> list[Turn]:
    """What each server gave, in that order; what fails is told by its turn.

    `client`: as each shall be asked; `measurer`: what measures by such a client; `keep` gets all turns after each.
    """
    turns = [Turn(kind) for kind in order]
    for number, turn in enumerate(turns):
        stage = f"server {number + 1} of {len(turns)}, {turn.kind}"
        try:
            match servers:
                case Launched():
                    log = servers.logs / f"server_{number + 1}_{turn.kind}.log"
                    with _started(servers, turn, client, log, progress, stage) as asked:
                        measure(measurer(with_model(asked)), turn, cases, 0, progress, stage)
                case Addresses():
                    visit = sum(earlier.kind == turn.kind for earlier in turns[:number])
                    asked = client.at(servers.urls[turn.kind])
                    if not asked.is_healthy():
                        raise EngineError(f"{show(asked.url)} is not healthy: start it, and wait until it serves")
                    measure(measurer(with_model(asked)), turn, cases, visit, progress, stage)
        except EngineError as error:
            turn.failure = str(error)
        keep(turns[: number + 1])
    return turns


def with_model(client: Client) -> Client:
    """The client with the name by which a server wants its model called.

    Raises:
        EngineError: the server does not say it.
    """
    if client.api.models is None:
        return client
    answer = Server(client.url, client.api_key, min(client.timeout_s, _MODELS_S)).ask(client.api.models)
    return client.with_model(client.api.model_name(answer))


def environment(kind: Kind) -> dict[str, str]:
    """Of a server without or with the plugin."""
    kept = {name: value for name, value in os.environ.items() if name != env.DISABLE}
    return {**kept, "PYTHONUNBUFFERED": "1", **({env.DISABLE: "1"} if kind == "stock" else {})}


@contextlib.contextmanager
def _started(
    servers: Launched, turn: Turn, client: Client, log: Path, progress: Progress, stage: str
) -> Iterator[Client]:
    """A client of a server that is started for this turn; afterwards it is gone, and its log is read.

    Raises:
        EngineError: it does not become healthy.
    """
    starting = f"{stage}: starting"
    progress(starting, 0, 1)
    command = client.api.command(sys.executable, servers.arguments)
    try:
        with server_process.running(
            command, environment(turn.kind), log, client.at, start_s=servers.start_s, life_s=_LIFE_S
        ) as server:
            turn.start_s = round(server.start_s, 1)
            progress(starting, 1, 1)
            yield server.client
    finally:
        if log.exists():
            turn.said = server_process.said_by(log)
