"""Try damaged input of every kind, in large numbers, and say what raised, hung, or printed oddly.

usage, from the repository root: python -m benchmarks.reliability [CHECK ...] [--count N] [--seed S] [--out FILE]

Without a GPU. Each check has a store of its own. The exit status is 1 where a fault was found; --out gets the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.reliability import files, processes
from benchmarks.reliability.judged import Result
from sglang_moe_ext import env

ENGINES_DIR = Path(os.environ.get("SGLANG_MOE_EXT_ENGINES", files.ROOT / ".engines"))
MEMORY_BYTES = 12 * 2**30
"""Of a check's address space: what takes more than that is a fault."""
_SHOWN_FAULTS = 5


def in_engine(engine: str, version: str, count: int, seed: int, folder: Path) -> Result:
    """Damaged tables in the user's store, behind the hooked lookup of that engine."""
    asked = {"engine": engine, "count": count, "seed": seed, "tables": files.sound_tables(), "store": str(folder)}
    paths = os.pathsep.join([str(files.ROOT), str(ENGINES_DIR / engine / version)])
    variables = {**os.environ, "PYTHONPATH": paths, env.STORE: str(folder), "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.reliability.in_engine"],
        input=json.dumps(asked), env=variables, cwd=files.ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if child.returncode != 0:
        return Result(faults=[f"the child ended with {child.returncode}: {child.stderr[-1500:]}"])
    return Result(**json.loads(child.stdout.splitlines()[-1]))


@dataclass(frozen=True, slots=True)
class Check:
    """`run` takes the number of inputs, a seed and an empty folder; `count` is the number by default."""

    what: str
    count: int
    run: Callable[[int, int, Path], Result]


CHECKS = {
    "sglang-tables": Check("tables in a server: SGLang 0.5.23, hooked", 80_000, partial(in_engine, "sglang", "0.5.23")),
    "vllm-tables": Check("tables in a server: vLLM 0.33.0, hooked", 20_000, partial(in_engine, "vllm", "0.33.0")),
    "commands": Check("tables given to `check` and `import`", 10_000, files.table_commands),
    "models": Check("model folders", 10_000, files.model_folders),
    "captures": Check("captured topk_ids", 1_500, files.captured_files),
    "journals": Check("journals given to `export`", 4_000, files.journals),
    "kills": Check("`import` killed at a random moment, then run again", 100, processes.kills),
    "readers": Check("reads by 8 processes beside a writer", 80_000, processes.readers),
}


def run(check: Check, count: int, seed: int) -> tuple[Result, float]:
    """In a process of its own, whose memory is bounded and whose store is empty."""
    with tempfile.TemporaryDirectory(prefix="reliability_") as name:
        reading, writing = os.pipe()
        begun = time.monotonic()
        if not (pid := os.fork()):
            os.close(reading)
            os.environ[env.STORE] = str(Path(name) / "store")
            os.environ["XDG_CACHE_HOME"] = str(Path(name) / "cache")
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            folder = Path(name) / "work"
            folder.mkdir()
            result = check.run(count, seed, folder)
            with os.fdopen(writing, "w") as pipe:
                json.dump([result.tried, result.refused, result.faults], pipe)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            said = pipe.read()
        status = os.waitpid(pid, 0)[1]
        result = Result(*json.loads(said)) if status == 0 else Result(faults=[f"the check ended with status {status}"])
        return result, time.monotonic() - begun


def main() -> int:
    """1 where a fault was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"of {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--count", type=int, help="inputs of each check (default: as many as its table says)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default 0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there as well")
    arguments = parser.parse_args()
    if unknown := set(arguments.checks) - set(CHECKS):
        parser.error(f"no check {', '.join(sorted(unknown))}: choose from {', '.join(CHECKS)}")
    head = (
        f"{datetime.date.today().isoformat()}, Python {platform.python_version()}, {os.cpu_count()} cores, seed "
        f"{arguments.seed}. Faults: any error that is not the package's own, a line of log or terminal over 2,000 "
        "characters or with characters that are not printable, more than 5 s of work, code that ran, a torn or mixed "
        "table."
    )
    lines = ["| check | tried | refused | faults | seconds |", "|---|---|---|---|---|"]
    faults = 0
    for name in arguments.checks or CHECKS:
        check = CHECKS[name]
        result, seconds = run(check, arguments.count or check.count, arguments.seed)
        faults += len(result.faults)
        lines.append(f"| {check.what} | {result.tried} | {result.refused} | {len(result.faults)} | {seconds:.0f} |")
        print(lines[-1], flush=True)
        for fault in result.faults[:_SHOWN_FAULTS]:
            print(f"  {fault!a}", flush=True)
    if arguments.out is not None:
        said = "What was damaged or killed, and how often it went wrong, by `python -m benchmarks.reliability`:"
        arguments.out.write_text("\n".join(["# Reliability", "", head, said, "", *lines]) + "\n", encoding="utf-8")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
