"""Does `tune --ray` on a real Ray cluster find what `tune --gpus all` finds, and in what time? Both on the same GPUs.

usage, from the repository root: python -m benchmarks.real_servers.ray_tune [--ray-site FOLDER] [--gpus 2]
       [--batch-size 1 64 1024 4096] [--warm-up] [--seconds 300] [--out FOLDER] [--json FILE] [-- FLAGS OF tune]

Starts a cluster of this machine (`ray start --head`), which ends with this command. FOLDER has an unpacked Ray, as
tools/pack_ray.sh packs one; without it, Ray must be installed. Tunes a dummy GLM-4.7-Flash twice, each time into a
fresh store; with `--warm-up` a run before compiles what is compiled once on a machine, so that the times compare.
Checked: both commands end well and write tables of the same layer for the same numbers of tokens; where they chose
another configuration, the time of the layer is the same within `--within` (default 5 %), by each run's own figures.
Takes 3 minutes on two GPUs. The status is 0 where all of that holds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.real_servers import forced_tables, servers
from benchmarks.real_servers.servers import Clock
from benchmarks.serving.http_server import CHECKOUT
from sglang_moe_ext import env
from sglang_moe_ext.core import EngineError, MoEExtError, Table
from sglang_moe_ext.e2e import server_process, supervised
from sglang_moe_ext.tables import config_table, provenance

_START_S, _LEAVE_S = 60.0, 20.0
WAYS = ("gpus", "ray")


@dataclass(frozen=True, slots=True)
class Tuned:
    """What one command took and wrote: entries and, where they were measured, microseconds, by file and tokens."""

    seconds: float
    tables: dict[str, Table]
    layer_us: dict[str, dict[int, float]]


@dataclass(slots=True)
class Comparison:
    """Of the tables of both commands. `slower`: of each entry that differs, how much longer Ray's choice takes."""

    entries: int = 0
    equal: int = 0
    slower: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


@contextlib.contextmanager
def cluster(gpus: int, folder: Path, log: Path, clock: Clock, path: str) -> Iterator[str]:
    """A cluster of this machine; its address. All of its processes are gone afterwards.

    Raises:
        EngineError: it does not start.
    """
    address = f"127.0.0.1:{server_process.free_port()}"
    cores = max(len(os.sched_getaffinity(0)), gpus)
    flags = ("--head", "--block", "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}")
    ray = ["-m", "ray.scripts.scripts", "start", *flags, f"--num-gpus={gpus}", f"--num-cpus={cores}"]
    watched = ["-m", supervised.__name__, str(os.getpid()), f"{max(clock.left_s(), 1):.0f}", sys.executable]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *watched, "-W", "ignore", *ray, f"--port={address.rpartition(':')[2]}"],
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"},
        )  # fmt: skip
    try:
        until = time.monotonic() + min(_START_S, clock.left_s())
        while "Ray runtime started" not in log.read_text(encoding="utf-8", errors="replace"):
            if process.poll() is not None or time.monotonic() > until:
                raise EngineError(f"no Ray cluster: {log.read_text(encoding='utf-8', errors='replace')[-600:]}")
            time.sleep(0.2)
        yield address
    finally:
        _end(process, folder)


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """The group first, then what Ray put into groups of their own, told by the folder that all of them name."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_LEAVE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for left in processes_that_name(str(folder)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)


def processes_that_name(words: str) -> list[int]:
    """Those whose command line or environment has these words, this process left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                said = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                found += [int(entry.name)] if words.encode() in said else []
    return found


def tune(model: Path, store: Path, flags: Sequence[str], asked: argparse.Namespace, clock: Clock, path: str) -> Tuned:
    """Tune into that store.

    Raises:
        EngineError: the command fails, or is late.
    """
    store.mkdir(parents=True)
    log = store.parent / f"{store.name}.log"
    command = [sys.executable, "-W", "ignore", "-m", "sglang_moe_ext.tune", "--model", str(model), "--install", "none"]
    command += ["--batch-size", *map(str, asked.batch_size), *flags, *asked.tune_flags]
    begun = time.monotonic()
    with log.open("wb") as out:
        done = subprocess.run(
            ["timeout", "-k", "5", "-s", "INT", f"{max(clock.left_s(), 1):.0f}", *command],
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, check=False,
            env={**os.environ, "PYTHONPATH": path, env.STORE: str(store)},
        )  # fmt: skip
    seconds = time.monotonic() - begun
    if done.returncode:
        raise EngineError(f"tune {' '.join(flags)} ended with {done.returncode}: {log.read_text()[-600:]}")
    return Tuned(seconds, *read(store))


def read(store: Path) -> tuple[dict[str, Table], dict[str, dict[int, float]]]:
    """Tables by file name, and the microseconds that their provenance has for the layer."""
    tables, figures = {}, {}
    for file in sorted((store / "tables").rglob("*.json")):
        if not config_table.is_table(file.name):
            continue
        tables[file.name] = config_table.read(file)
        known = provenance.read(file)
        entries = known.entries if known else {}
        figures[file.name] = {m: entry.figures["us"] for m, entry in entries.items() if "us" in entry.figures}
    return tables, figures


def compare(gpus: Tuned, ray: Tuned, within: float) -> Comparison:
    """What is the same, and what does not hold."""
    found = Comparison()
    if not gpus.tables or gpus.tables.keys() != ray.tables.keys():
        found.wrong.append(f"tables of {sorted(gpus.tables)} and of {sorted(ray.tables)}")
        return found
    for name, table in gpus.tables.items():
        other = ray.tables[name]
        if table.keys() != other.keys():
            found.wrong.append(f"{name}: entries for {sorted(table)} and for {sorted(other)}")
            continue
        found.entries += len(table)
        found.equal += sum(table[m] == other[m] for m in table)
        for m in (m for m in table if table[m] != other[m]):
            one, two = gpus.layer_us[name].get(m), ray.layer_us[name].get(m)
            if one and two:
                found.slower[f"{name} M={m}"] = two / one - 1
    far = {name: f"{value:+.1%}" for name, value in found.slower.items() if abs(value) > within}
    found.wrong += [f"{name}: Ray's choice takes {value}" for name, value in far.items()]
    return found


def table(tuned: Mapping[str, Tuned], found: Comparison | None) -> str:
    """Both commands as markdown."""
    rows = ["| command | seconds | entries | equal to the other's | largest difference of the layer's time |"]
    rows += ["|---|---:|---:|---:|---:|"]
    far = max((abs(it) for it in found.slower.values()), default=0.0) if found else 0.0
    for way, one in tuned.items():
        entries = sum(map(len, one.tables.values()))
        same = f"{found.equal} | {far:.1%}" if found else "- | -"
        rows.append(f"| tune --{way} | {one.seconds:.1f} | {entries} | {same} |")
    return "\n".join(rows)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--ray-site", type=Path, metavar="FOLDER", help="with an unpacked Ray")
    arguments.add_argument("--gpus", type=int, default=2, help="of this machine (default 2)")
    arguments.add_argument("--model", default="glm_4_7_flash", help="of benchmarks/dummy_model.py")
    arguments.add_argument("--batch-size", type=int, nargs="+", default=[1, 64, 1024, 4096])
    arguments.add_argument("--warm-up", action="store_true", help="tune once before the two that are timed")
    arguments.add_argument("--within", type=float, default=0.05, help="of the layer's time (default 0.05)")
    arguments.add_argument("--seconds", type=float, default=300.0, help="of the whole command (default 300)")
    arguments.add_argument("--out", type=Path, help="a fresh folder that keeps stores and logs")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    arguments.add_argument("tune_flags", nargs="*", metavar="-- FLAGS", help="more flags of tune")
    return arguments


def run(asked: argparse.Namespace, scratch: Path) -> tuple[dict[str, Tuned], Comparison]:
    """Both commands, one after the other, and how their tables compare.

    Raises:
        EngineError: one fails.
    """
    from benchmarks import dummy_model

    clock = Clock(asked.seconds)
    out = (asked.out or scratch / "out").absolute()
    out.mkdir(parents=True, exist_ok=True)
    dummy_model.write(scratch / "model", asked.model)
    sites = (str(CHECKOUT), asked.ray_site and str(asked.ray_site.absolute()), os.environ.get("PYTHONPATH"))
    path = os.pathsep.join(filter(None, sites))
    visible = ",".join(map(str, range(asked.gpus)))
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", visible)
    if asked.warm_up:
        tune(scratch / "model", out / "warm_up", ("--effort", "quick", "--gpus", "all"), asked, clock, path)
    tuned = {"gpus": tune(scratch / "model", out / "gpus", ("--gpus", "all"), asked, clock, path)}
    # The path of a socket in Ray's folder must be short.
    with (
        tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as short,
        cluster(asked.gpus, Path(short), out / "ray_start.log", clock, path) as address,
    ):
        tuned["ray"] = tune(scratch / "model", out / "ray", ("--ray", address), asked, clock, path)
    return tuned, compare(tuned["gpus"], tuned["ray"], asked.within)


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else list(words)
    asked = parser().parse_args(words)
    place = forced_tables.here(is_cpu=False)
    with tempfile.TemporaryDirectory() as scratch:
        tuned, found = run(asked, Path(scratch))
    print("\n".join(f"WRONG: {line}" for line in found.wrong) or "every statement holds")
    print(f"\n{table(tuned, found)}")
    document = servers.circumstances(words, "benchmarks.real_servers.ray_tune", place)
    seconds = {way: round(one.seconds, 1) for way, one in tuned.items()}
    servers.save(asked.json, document | {"seconds": seconds, **asdict(found)})
    return 1 if found.wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MoEExtError as error:
        sys.exit(f"error: {error}")
