"""Tune a list of layers, one `tune` each, and turn what came of it into the tables that ship.

usage, from the repository root, on a machine with GPUs:
    python -m benchmarks.tune_collection LIST --out FOLDER [--seconds 1500] [--gpus 0 1] [-- FLAGS OF TUNE]
and then, anywhere:
    python -m benchmarks.tune_collection --collect FOLDER [FOLDER ...]

LIST has the arguments of one `tune` in each line: --model, --tp-size, --ep-size, --dtype and --engine. Lines with one
and the same layer are tuned once. FOLDER keeps a store for each row, a line of results.jsonl for each row that ended,
and, after each, all tables in tables.tar.xz and all journals in journals.tar.xz: what to carry home. A row that ended
well is not tuned again; after `--seconds`, or where the longest row so far would not fit any more, none is begun.
`--collect` takes the folders' tables into tuned_configs/ and writes docs/benchmarks/collection.md; nothing is
committed. Exit status: 0 where every row ended well, 1 where one failed or was not begun, 2 for a wrong list.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.collection import archive, page, rows, shipping
from benchmarks.collection.page import Unshipped
from benchmarks.collection.rows import Row
from benchmarks.vs_upstream import timed_run
from sglang_moe_ext import env
from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.engines import table_names

CHECKOUT = Path(__file__).parents[1]
TUNED_CONFIGS = CHECKOUT / "tuned_configs"
PAGE = CHECKOUT / "docs" / "benchmarks" / "collection.md"
FLAGS = ("--effort", "quick", "--install", "none", "--quiet")
_FIRST_ROW_S = 60.0
"""What a row is expected to take before one ended."""
_LONGEST_ROW_S = 600.0


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one row. `why`: the last line that a failing `tune` said."""

    slug: str
    engine: str
    shape: str
    launches: tuple[str, ...]
    seconds: float
    why: str | None = None


Tune = Callable[[Row, Path, str, float], Result]
"""Tunes a row into a store, on the GPU of that index, within so many seconds."""


def tune(row: Row, store: Path, gpu: str, limit_s: float, flags: Sequence[str] = FLAGS) -> Result:
    """Run one `tune` as a user would."""
    command = [sys.executable, "-W", "ignore", "-m", "sglang_moe_ext.tune", *row.arguments, *flags]
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, env.STORE: str(store), "CUDA_VISIBLE_DEVICES": gpu, "PYTHONPATH": path}
    with tempfile.TemporaryDirectory() as folder:
        done = timed_run.timed(command, environment, Path(folder), limit_s)
    why = None if done.status == 0 else f"stopped after {limit_s:.0f} s" if done.status is None else done.last_words
    return Result(row.slug, row.engine, str(row.shape), row.launches, round(done.seconds, 1), why)


def read_results(folder: Path) -> dict[str, Result]:
    """The newest result of each row, by its slug; a line that a kill cut off counts for nothing."""
    found: dict[str, Result] = {}
    try:
        lines = (folder / archive.RESULTS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            document = json.loads(line)
            result = Result(**{**document, "launches": tuple(document["launches"])})
        except (ValueError, TypeError, KeyError):
            continue
        found[result.slug] = result
    return found


class Collection:
    """Works through rows on several GPUs; each result is on disk, and packed, before the next row begins."""

    def __init__(self, out: Path, seconds: float, tune_row: Tune = tune) -> None:
        self._out, self._tune = out, tune_row
        self._until = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._longest_s = 0.0

    def run(self, wanted: Sequence[Row], gpus: Sequence[str]) -> dict[str, Result]:
        """The results of all rows that ended, those of earlier calls included."""
        done = {slug: it for slug, it in read_results(self._out).items() if it.why is None}
        left = queue.SimpleQueue[Row]()
        for row in wanted:
            if row.slug not in done:
                left.put(row)
        threads = [threading.Thread(target=self._work, args=(gpu, left)) for gpu in gpus]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return read_results(self._out)

    def _work(self, gpu: str, left: queue.SimpleQueue[Row]) -> None:
        while True:
            left_s = self._until - time.monotonic()
            if left_s < (self._longest_s or _FIRST_ROW_S):
                return
            try:
                row = left.get_nowait()
            except queue.Empty:
                return
            store = self._out / archive.ROWS / row.slug
            store.mkdir(parents=True, exist_ok=True)
            self._keep(row, self._tune(row, store, gpu, min(left_s, _LONGEST_ROW_S)))

    def _keep(self, row: Row, result: Result) -> None:
        with self._lock:
            self._longest_s = max(self._longest_s, result.seconds)
            with (self._out / archive.RESULTS).open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(asdict(result)) + "\n")
            archive.pack(self._out)
        print(f"{rows.describe_launches(row.launches)}: {self._describe(row, result)}", flush=True)

    def _describe(self, row: Row, result: Result) -> str:
        if result.why is not None:
            return f"failed after {result.seconds:.0f} s: {result.why}"
        tables = shipping.up_tables(self._out / archive.ROWS / row.slug)
        found = {} if not tables else shipping.gains(tables[0][1])
        mean = page.geometric_mean(gain.value for gain in found.values())
        ours = sum(gain.is_ours for gain in found.values())
        gained = (
            "no gain is known" if mean is None else f"{mean:.3f}x over {len(found)} batch sizes, {ours} by our kernels"
        )
        return f"{result.seconds:.0f} s, {gained}"


def collect(folders: Iterable[Path], tuned_configs: Path) -> list[Unshipped]:
    """Take the rows that are worth it into `tuned_configs`; those that are not, each with the reason.

    Rows that failed are named on standard error alone: nothing was measured.

    Raises:
        MoEExtError: a folder lacks its archive, or a table cannot be read.
    """
    unshipped: list[Unshipped] = []
    for folder in folders:
        with tempfile.TemporaryDirectory() as unpacked:
            archive.unpack(folder / archive.TABLES, Path(unpacked))
            for result in read_results(folder).values():
                models = rows.describe_launches(result.launches)
                if result.why is not None:
                    print(f"{models}: was not tuned: {result.why}", file=sys.stderr)
                    continue
                for engine, table in shipping.up_tables(Path(unpacked) / archive.ROWS / result.slug):
                    if (why := _take(engine, table, tuned_configs)) is not None:
                        gpu = table_names.parse(table.name).device_name
                        unshipped.append(Unshipped(engine, gpu, models, result.shape, why))
    return unshipped


def _take(engine: str, table: Path, tuned_configs: Path) -> str | None:
    """Why that table does not ship; None where it now does."""
    if not shipping.is_worth_shipping(shipping.gains(table)):
        return f"no gain of {shipping.LEAST_GAIN} or more beyond doubt: what the engine runs is as good"
    return shipping.put(engine, table, tuned_configs)


def main(arguments: Sequence[str] | None = None, made: Mapping[str, Any] | None = None) -> int:
    """Exit status as the module says. `made`: `tune`, in place of the command's, for a test."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    flags = given[given.index("--") + 1 :] if "--" in given else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", nargs="?", type=Path, metavar="LIST")
    parser.add_argument("--out", type=Path, help="folder for stores, results and archives")
    parser.add_argument("--seconds", type=float, default=1500.0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    parser.add_argument("--gpus", nargs="+", default=visible, help="GPUs, each of which takes a row at a time")
    parser.add_argument("--collect", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--into", type=Path, default=TUNED_CONFIGS)
    parser.add_argument("--page", type=Path, default=PAGE)
    asked = parser.parse_args(given[: given.index("--")] if "--" in given else given)
    try:
        if asked.collect:
            unshipped = collect(asked.collect, asked.into)
            asked.page.write_text(page.write(asked.into, unshipped), encoding="utf-8")
            return 0
        if asked.list is None or asked.out is None:
            parser.error("a LIST and --out are needed, or --collect")
        wanted = rows.parse(asked.list.read_text(encoding="utf-8"))
    except (MoEExtError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    asked.out.mkdir(parents=True, exist_ok=True)

    def tune_row(row: Row, store: Path, gpu: str, limit_s: float) -> Result:
        return tune(row, store, gpu, limit_s, (*FLAGS, *flags))

    results = Collection(asked.out, asked.seconds, (made or {}).get("tune", tune_row)).run(wanted, asked.gpus)
    ended = {slug for slug, result in results.items() if result.why is None}
    missing = [row for row in wanted if row.slug not in ended]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} rows are tuned; not: ", end="")
    print("; ".join(rows.describe_launches(row.launches) for row in missing) or "none")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
