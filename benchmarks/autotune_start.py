"""How much later is a server ready that tunes its layer at its first start? Stock, first start, second start.

usage, from any folder, with this checkout on PYTHONPATH: python -m benchmarks.autotune_start [--model glm_4_7_flash]
       [--layers 8] [--budget 60] [--kills 10] [--seed 0] [--out FOLDER]

Real SGLang HTTP servers of a dummy model, with a fresh store. With --kills, as many servers with another store are
killed at random moments before they are ready, by SIGKILL of their process group, which the tuner is not in; after
each, no tuner may be left and every file of the store must be whole. A store in which the tuner had finished is
replaced by a fresh one, but for the last. The next start must then be right.
Needs SGLang 0.5.11 or newer and a GPU with 80 GB. The status is 0 where every statement of the table holds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import dummy_model
from benchmarks.serving import http_server, plugin_site
from benchmarks.serving.http_server import Launch
from sglang_moe_ext import env
from sglang_moe_ext.core import EngineError

LATER_S = 75.0
"""What a first start may take beyond stock with a budget of 60 s; another budget moves it by as much."""
_LIFE_S, _GONE_S, _EARLIEST_KILL_S = 560.0, 5.0, 2.0
_FOR_SERVER = b"--for-server"


@dataclass(frozen=True, slots=True)
class Start:
    """One server that became ready after `seconds`, or did not: `failure`. `said`: its lines about this package."""

    name: str
    seconds: float
    said: tuple[str, ...] = ()
    failure: str | None = None

    @property
    def is_tuned(self) -> bool:
        """Whether a layer runs a measured table of the user's store."""
        return any("your table" in line and "(measured" in line for line in self.said)


def start(name: str, launch: Launch, log: Path, *, stock: bool) -> Start:
    """Start a server, ask it for a token, end it."""
    begun = time.monotonic()
    try:
        with http_server.running(launch, log, stock=stock) as server:
            server.client.first_token_ms(64, 0)
            return Start(name, server.start_s, server.said().tables)
    except EngineError as error:
        return Start(name, time.monotonic() - begun, failure=str(error))


def tuners(store: Path) -> list[int]:
    """Process ids of tuners that a server with that store started and that run now."""
    wanted, found = f"{env.STORE}={store}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                is_its = wanted in (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            found += [int(entry.name)] if _FOR_SERVER in words and is_its else []
    return found


def broken_files(store: Path) -> list[Path]:
    """JSON files of the store that cannot be read."""
    return [path for path in store.rglob("*.json") if not _is_json(path)]


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def kill_one(launch: Launch, after_s: float, store: Path, log: Path) -> str | None:
    """Kill a server that has not become ready after so long; what was wrong afterwards."""
    late = Launch(launch.command, launch.site, launch.folder, launch.life_s, start_s=after_s)
    found = start("killed", late, log, stock=False)
    if found.failure is None:
        return None  # it was ready before
    until = time.monotonic() + _GONE_S
    while tuners(store) and time.monotonic() < until:
        time.sleep(0.1)
    left, broken = tuners(store), broken_files(store)
    if left:
        return f"killed after {after_s:.1f} s: tuners are left: {left}"
    return f"killed after {after_s:.1f} s: broken files: {broken}" if broken else None


def run(asked: argparse.Namespace, out: Path) -> bool:
    """All servers in turn; the table last. Whether every statement holds."""
    site, model = out / "site", out / "model"
    plugin_site.write(site, spread_weights=False)
    dummy_model.write(model, asked.model, asked.layers)
    launch = Launch(http_server.command_of(model), site, out, _LIFE_S, start_s=_LIFE_S)
    os.environ[env.STORE], os.environ[env.AUTOTUNE] = str(out / "store"), f"{asked.budget:g}"
    wrong: list[str] = []
    starts = [
        start(name, launch, out / f"{name.replace(' ', '_')}.log", stock=name == "stock")
        for name in ("stock", "first start", "second start")
    ]
    if asked.kills:
        os.environ[env.STORE] = str(out / "killed_store")
        moments = random.Random(asked.seed)
        for number in range(asked.kills):
            after_s = moments.uniform(_EARLIEST_KILL_S, starts[1].seconds)
            trouble = kill_one(launch, after_s, out / "killed_store", out / f"killed_{number}.log")
            print(
                f"kill {number + 1} of {asked.kills} after {after_s:.1f} s: {trouble or 'nothing is left'}", flush=True
            )
            wrong += [] if trouble is None else [trouble]
            if number + 1 < asked.kills and any((out / "killed_store").rglob("E=*.json")):
                shutil.rmtree(out / "killed_store")
        starts.append(start("after the kills", launch, out / "after_kills.log", stock=False))
    stock, first, second, *_ = starts
    wrong += [f"{one.name}: {one.failure}" for one in starts if one.failure is not None]
    wrong += [f"{one.name}: runs no measured table" for one in starts[1:] if not one.is_tuned]
    if first.seconds > stock.seconds + asked.budget + LATER_S - 60.0:
        wrong.append(f"the first start was {first.seconds - stock.seconds:.1f} s later than stock")
    if any("tunes" in line for line in second.said):
        wrong.append("the second start tuned again")
    for one in starts:
        for line in one.said:
            print(f"{one.name}: {line}")
    print(f"{'start':<16} {'ready after s':>13} {'later than stock s':>18}")
    for one in starts:
        print(f"{one.name:<16} {one.seconds:>13.1f} {one.seconds - stock.seconds:>18.1f}")
    print("\n".join(f"WRONG: {line}" for line in wrong) or "every statement holds")
    return not wrong


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", choices=list(dummy_model.MODELS), default="glm_4_7_flash")
    arguments.add_argument("--layers", type=int, default=8)
    arguments.add_argument("--budget", type=float, default=60.0, help=f"what {env.AUTOTUNE} says (default 60)")
    arguments.add_argument("--kills", type=int, default=0, help="servers to kill at random moments (default 0)")
    arguments.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    arguments.add_argument("--out", type=Path, help="keep logs and stores there; it must not have a store yet")
    return arguments


def main() -> int:
    asked = parser().parse_args()
    if asked.out is not None:
        if (asked.out / "store").exists():
            print(f"error: {asked.out} has a store already: name a fresh folder", file=sys.stderr)
            return 2
        asked.out.mkdir(parents=True, exist_ok=True)
        return 0 if run(asked, asked.out.absolute()) else 1
    with tempfile.TemporaryDirectory() as scratch:
        return 0 if run(asked, Path(scratch)) else 1


if __name__ == "__main__":
    sys.exit(main())
