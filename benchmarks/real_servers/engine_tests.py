"""Do the engines' own tests of their fused-MoE layer say the same with the plugin? Unmodified, stock beside plugin.

usage, from the repository root: python -m benchmarks.real_servers.engine_tests
       [--sglang-tests FOLDER] [--vllm-tests FOLDER] [--share 1.0] [--files NAME ...] [--at-a-time 4] [--gpus 2]
       [--seconds 150] [--out FOLDER] [--json FILE]

FOLDER of SGLang's has test files of its repository's test/; of vLLM's, the folder `tests` of its source distribution
(docs/benchmarks/real-servers.md says how to get both). Each file runs in a process of its own, once without the plugin
and once with it, for which a store has tables for all layers of these tests: at a few numbers of tokens configurations
that no GPU has the memory for, which the guard must make smaller, and kernel plans wherever our kernels can run.
`--share` runs a part of the parametrizations, the same each time; what is late is not run.
Checked: every test that ran in both has the same result; with the plugin, our kernels ran, and the guard did its work.
Needs a GPU, pytest, and the engine. The status is 0 where all of that holds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

from benchmarks.real_servers import forced_tables, in_tests, servers
from benchmarks.real_servers.forced_tables import Here
from benchmarks.real_servers.servers import Clock
from benchmarks.serving.http_server import CHECKOUT
from sglang_moe_ext import env
from sglang_moe_ext.core import EngineError, MoEExtError, MoEShape, Quantization
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.engines.sglang import table_names as sglang_names
from sglang_moe_ext.engines.vllm import table_names as vllm_names
from sglang_moe_ext.few_tokens_config import DownTile, FewTokensConfig, UpTile
from sglang_moe_ext.kernel_plans import DownConfig, KernelPlan, Plan, UpConfig
from sglang_moe_ext.serving.kernel_selection import SHORTEST_US
from sglang_moe_ext.tables import config_table, plan_table
from sglang_moe_ext.tables.plan_table import KernelEntry
from sglang_moe_ext.tables.provenance import TuningRun

FILES: Mapping[EngineName, tuple[str, ...]] = {
    "sglang": (
        "test_fused_moe.py",
        "test_triton_fused_moe.py",
        "test_triton_moe_channel_fp8_kernel.py",
        "test_block_fp8.py",
    ),
    "vllm": (
        "tests/kernels/moe/test_moe.py",
        "tests/kernels/moe/test_block_fp8.py",
        "tests/kernels/moe/test_modular_kernel_combinations.py",
    ),
}
WORDS: Mapping[str, str] = {
    "test_block_fp8.py": "FusedMoE",
    "tests/kernels/moe/test_moe.py": "test_fused_moe and not wn16 and not int64 or test_naive_block_assignment_moe",
    "tests/kernels/moe/test_block_fp8.py": "w8a8_block_fp8_fused_moe",
    "tests/kernels/moe/test_modular_kernel_combinations.py": "single",
}
"""`-k` of pytest: tests of the layer alone, where a file has others."""
EXPERTS = (2, 4, 6, 8, 16, 24, 32, 64, 128, 192, 256)
INNER = (64, 128, 256, 512, 768, 1024, 2048, 4096)
HIDDEN, TOP_K = (128, 256, 511, 512, 1024, 1408, 2048, 4096, 7168), (1, 2, 4, 6, 8)
SCHEMES = (
    Quantization(),
    Quantization("fp8_w8a8"),
    Quantization("fp8_w8a8", per_channel=True),
    *(Quantization("fp8_w8a8", block) for block in ((64, 64), (64, 128), (128, 64), (128, 128))),
)
_TILE, _TOO_LARGE = forced_tables.TILE, forced_tables.TOO_LARGE
TABLE = {1: _TILE, 32: _TILE, 64: _TOO_LARGE, 222: _TOO_LARGE, 1024: _TILE}
SIXTEEN_BITS = KernelPlan(UpConfig(128, 128, 64, 8, 8, 4), DownConfig(128, 256, 64, 8, 8, 4, half_stores=True))
EIGHT_BITS = KernelPlan(
    UpConfig(64, 128, 128, 8, 8, 2, persistent=False), DownConfig(64, 128, 128, 8, 4, 4, programs_per_sm=2)
)
FEW_TOKENS = FewTokensConfig(
    UpTile(8, 16, 128, 2, 5), DownTile(8, 64, 128, 4, 4, split=4), grouped=True, wide_range=True
)
"""As benchmarks/path_modes.py proves them."""


@dataclass(frozen=True, slots=True)
class Ran:
    """The tests of a file in one process: outcome by test, our log's lines, and how often a plan of ours ran."""

    outcomes: dict[str, str]
    why: dict[str, str]
    lines: tuple[str, ...]
    plans: int
    status: int


@dataclass(slots=True)
class Row:
    """A file, stock beside plugin. `differ`: each test with another result; `wrong`: what else does not hold."""

    engine: EngineName
    file: str
    stock: dict[str, int] = field(default_factory=dict)
    plugin: dict[str, int] = field(default_factory=dict)
    plans: int = 0
    guarded: int = 0
    differ: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def write_tables(store: Path, engine: EngineName, place: Here) -> None:
    """Tables and plans of every layer that these tests may launch."""
    names = sglang_names if engine == "sglang" else vllm_names
    folder = store / "tables" / engine / sglang_names.version_folder(place.triton)
    folder.mkdir(parents=True, exist_ok=True)
    # A file names experts and columns alone; a plan is taken for the hidden sizes and top-k that its run names.
    made_for = "".join(f",K={hidden},topk={top_k}," for hidden, top_k in product(HIDDEN, TOP_K))
    run = TuningRun("", "", "", made_for, "", "", None, None, None, None, 0, "")
    for experts, inner, scheme in product(EXPERTS, INNER, SCHEMES):
        shape = MoEShape(experts, inner, HIDDEN[0], 1, scheme)
        path = folder / names.file_name(names.table_key(shape, place.device_name))
        path.write_text(config_table.to_json(TABLE), encoding="utf-8")
        entries = {m: KernelEntry(plan, run, {"us": SHORTEST_US}) for m, plan in plans_of(scheme).items()}
        plan_table.put(plan_table.path_beside(path), entries)


def plans_of(scheme: Quantization) -> dict[int, Plan]:
    """By numbers of tokens: a plan for few, the same for each scheme, and one behind a sort."""
    sorted_plan = SIXTEEN_BITS if scheme.scheme is None else EIGHT_BITS
    return {1: FEW_TOKENS, 8: FEW_TOKENS, 30: sorted_plan, 16384: sorted_plan}


def write_stand_in(folder: Path) -> None:
    """An empty `datasets` where there is none that can be imported: SGLang's test_utils imports it for other tests."""
    folder.mkdir(parents=True, exist_ok=True)
    check = [sys.executable, "-W", "ignore", "-c", "from datasets import load_dataset"]
    if subprocess.run(check, capture_output=True, timeout=60, check=False).returncode:
        (folder / "datasets.py").write_text("load_dataset = None\n", encoding="utf-8")


def write_site(folder: Path) -> None:
    """What has each Python of the tests run the startup file."""
    folder.mkdir(parents=True, exist_ok=True)
    begins = "from benchmarks.real_servers import in_tests\n\nin_tests.begin()\n"
    (folder / "sitecustomize.py").write_text(begins, encoding="utf-8")


def run(folder: Path, file: str, out: Path, asked: argparse.Namespace, more: Mapping[str, str], clock: Clock) -> Ran:
    """The tests of a file in a process group of its own, which is ended when the time is over."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    words = ["-k", WORDS[file]] if file in WORDS else []
    plain = ["-q", "-c", "/dev/null", "--rootdir", str(folder), "--confcutdir", str((folder / file).parent)]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "pytest",
        *plain,
        "-p",
        "no:cacheprovider",
        "-p",
        in_tests.__name__,
    ]
    path = os.pathsep.join(
        filter(None, [more.get("PYTHONPATH"), str(folder), str(CHECKOUT), os.environ.get("PYTHONPATH")])
    )
    limits = {in_tests.SHARE: f"{asked.share:g}", in_tests.SECONDS: f"{max(clock.left_s() - asked.spare_s, 0):.0f}"}
    quiet = {**servers.WITHOUT_MULTICAST, "HF_HUB_OFFLINE": "1", in_tests.OUT: str(out)}
    left_s = max(clock.left_s(), 1.0)
    with (out / "pytest.txt").open("wb") as log:
        done = subprocess.run(
            ["timeout", "-k", "2", "-s", "INT", f"{left_s:.0f}", *command, *words, file],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=folder, check=False,
            env={**os.environ, **quiet, **limits, **more, "PYTHONPATH": path},
        )  # fmt: skip
    found, lines, plans = in_tests.read(out)
    outcomes: dict[str, str] = {}
    why: dict[str, str] = {}
    for one in found:
        outcome = "late" if in_tests.LATE in one["why"] else one["outcome"]
        if outcome != "passed" or one["test"] not in outcomes:
            outcomes[one["test"]], why[one["test"]] = outcome, one["why"]
    return Ran(outcomes, why, tuple(lines), plans, done.returncode)


def compare(engine: EngineName, file: str, stock: Ran, plugin: Ran) -> Row:
    """What is told of a file."""
    in_stock, in_plugin = (dict(Counter(ran.outcomes.values())) for ran in (stock, plugin))
    row = Row(engine, file, in_stock, in_plugin, plugin.plans)
    row.guarded = sum("instead" in line or "refused" in line for line in plugin.lines)
    for test, outcome in stock.outcomes.items():
        other = plugin.outcomes.get(test, "late")
        if other != outcome and "late" not in (other, outcome):
            row.differ.append(f"{test}: {outcome}, with the plugin {other} {plugin.why.get(test, '')}")
    ran = stock.outcomes.keys() & plugin.outcomes.keys()
    wrong = {
        f"no test ran: pytest ended with {stock.status} and {plugin.status}": not ran,
        "the plugin was not active": bool(row.plugin.get("passed"))
        and not any("is active in" in it for it in plugin.lines),
        "the stock tests had the plugin": bool(stock.lines),
    }
    row.wrong = [text for text, is_so in wrong.items() if is_so]
    return row


def rows(asked: argparse.Namespace, scratch: Path, place: Here, clock: Clock) -> Iterator[Row]:
    """Every file of every engine whose tests are given."""
    out = (asked.out or scratch / "out").absolute()
    write_site(scratch / "site")
    write_stand_in(scratch / "stand_in")
    jobs: dict[str, Callable[[], Ran]] = {}
    folders: dict[EngineName, Path | None] = {"sglang": asked.sglang_tests, "vllm": asked.vllm_tests}
    chosen = [
        (engine, folder.absolute(), file)
        for engine, folder in folders.items()
        if folder is not None
        for file in FILES[engine]
        if not asked.files or Path(file).name in asked.files
    ]
    for engine in {engine for engine, _, _ in chosen}:
        write_tables(out / "store", engine, place)
    for engine, folder, file in chosen:
        for kind in ("stock", "plugin"):
            both = str(scratch / "stand_in")
            with_ours = f"{scratch / 'site'}{os.pathsep}{both}"
            variables = (
                {"PYTHONPATH": both} if kind == "stock" else {"PYTHONPATH": with_ours, env.STORE: str(out / "store")}
            )
            gpus = servers.gpus_of(len(jobs), 1, asked.gpus)
            at = out / engine / Path(file).stem / kind
            jobs[f"{engine} {file} {kind}"] = servers.job(run, folder, file, at, asked, {**gpus, **variables}, clock)
    found = servers.at_once(jobs, at_a_time=asked.at_a_time)
    for engine, _, file in chosen:
        stock, plugin = found[f"{engine} {file} stock"], found[f"{engine} {file} plugin"]
        if isinstance(stock, EngineError) or isinstance(plugin, EngineError):
            yield Row(engine, file, wrong=["not run"])
        else:
            yield compare(engine, file, stock, plugin)


def wrong_of(told: Sequence[Row], *, needs_gpu: bool) -> list[str]:
    """What does not hold, of all files."""
    wrong = [f"{row.file}: {line}" for row in told for line in (*row.wrong, *row.differ)]
    for engine in {row.engine for row in told} if needs_gpu else ():
        of_engine = [row for row in told if row.engine == engine]
        wrong += [] if any(row.plans for row in of_engine) else [f"{engine}: no plan of ours ran"]
        wrong += [] if any(row.guarded for row in of_engine) else [f"{engine}: the guard had nothing to do"]
    return wrong


def table(told: Sequence[Row]) -> str:
    """The rows as markdown: passed / failed / skipped, and those that no time was left for."""
    lines = [
        "| engine | file | stock: passed / failed / skipped / late | with the plugin | differ | plans ran | guarded |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    kinds = ("passed", "failed", "skipped", "late")
    for row in told:
        stock, plugin = (" / ".join(str(counts.get(kind, 0)) for kind in kinds) for counts in (row.stock, row.plugin))
        ours = f"{len(row.differ)} | {row.plans} | {row.guarded}"
        lines.append(f"| {row.engine} | {Path(row.file).name} | {stock} | {plugin} | {ours} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sglang-tests", type=Path, metavar="FOLDER")
    arguments.add_argument("--vllm-tests", type=Path, metavar="FOLDER")
    arguments.add_argument("--files", nargs="+", metavar="NAME", help="only these")
    arguments.add_argument("--share", type=float, default=1.0, help="of the parametrizations (default 1)")
    arguments.add_argument("--at-a-time", type=int, default=4, help="processes beside each other (default 4)")
    arguments.add_argument("--gpus", type=int, default=1, help="GPUs to spread them over (default 1)")
    arguments.add_argument("--seconds", type=float, default=150.0, help="of the whole command (default 150)")
    arguments.add_argument("--spare-s", type=float, default=10.0, help=argparse.SUPPRESS)
    arguments.add_argument("--out", type=Path, help="a folder that keeps what pytest wrote")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    arguments.add_argument("--cpu", action="store_true", help="try this command out where there is no GPU")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else list(words)
    asked = parser().parse_args(words)
    if asked.sglang_tests is None and asked.vllm_tests is None:
        sys.exit("error: name --sglang-tests or --vllm-tests")
    place, clock = forced_tables.here(is_cpu=asked.cpu), Clock(asked.seconds)
    with tempfile.TemporaryDirectory() as scratch:
        told = list(rows(asked, Path(scratch), place, clock))
    wrong = wrong_of(told, needs_gpu=not asked.cpu)
    print("\n".join(f"WRONG: {line}" for line in wrong) or "every statement holds")
    print(f"\n{table(told)}")
    document = servers.circumstances(words, "benchmarks.real_servers.engine_tests", place)
    servers.save(asked.json, document | {"files": [asdict(row) for row in told], "wrong": wrong})
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MoEExtError as error:
        sys.exit(f"error: {error}")
