"""Does the plugin serve on two ranks as stock does? SGLang with TP 2, and with TP 2 and EP 2, on two GPUs.

usage, from the repository root: python -m benchmarks.real_servers.tensor_parallel [--cases tp2 tp2_ep2]
       [--requests 24] [--new-tokens 8] [--at-a-time 5] [--seconds 200] [--out FOLDER] [--json FILE]

For each case a stock server and one with the plugin, whose store has tables and kernel plans that nothing ships
(`forced_tables`); for the first case a third, stock with another tile, which says how far a tile alone changes
answers. The servers run beside each other on the same two GPUs, and answer the same prompts one by one.
Checked: both ranks say that the plugin is active, and name the same table; both sample the same tokens at every step;
the answers agree with those of stock as far as those of the other tile do.
Takes 2 minutes on two GPUs with 80 GB where the engine's kernels are compiled already; SGLang 0.5.15.
The status is 0 where all of that holds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.real_servers import answers, forced_tables, ranks, servers
from benchmarks.real_servers.answers import Agreement
from benchmarks.real_servers.servers import MANY_RANKS, NO_GRAPHS, Setup
from benchmarks.serving.outputs import OTHER_TILE
from sglang_moe_ext import env
from sglang_moe_ext.core import EngineError, MoEExtError, MoEShape
from sglang_moe_ext.tables import config_table

RANKS = 2
CASES: Mapping[str, tuple[str, ...]] = {"tp2": ("--tp", "2"), "tp2_ep2": ("--tp", "2", "--ep-size", "2")}
_ACTIVE, _TABLE, _LOADED, _PLANNED = "is active in", "your table", "plans are loaded", "our own kernels run at"
_DECLINED = "the engine's own kernels run"
_STEPS_S = 5.0


@dataclass(frozen=True, slots=True)
class Answers:
    """Of one server: its answers, our lines of each rank, and whether its ranks sampled the same tokens."""

    start_s: float
    tokens: list[list[int]]
    lines: dict[int, list[str]]
    same_in_ranks: bool


@dataclass(slots=True)
class Row:
    """What is told of a case; `wrong`: what does not hold."""

    case: str
    active: int = 0
    tables: list[str] = field(default_factory=list)
    plan: str = "none"
    same_in_ranks: bool = False
    agreement: Agreement | None = None
    control: Agreement | None = None
    wrong: list[str] = field(default_factory=list)


def shapes(setup: Setup) -> tuple[MoEShape, ...]:
    """The layers that tables are written for."""
    if not setup.is_cpu:
        return forced_tables.glm_layers(RANKS)
    return (MoEShape(8, 32, 64, 2), MoEShape(4, 32, 64, 2, ep=RANKS))  # the tiny model, padded on a CPU


def ask(setup: Setup, name: str, asked: argparse.Namespace, flags: Sequence[str], more: Mapping[str, str]) -> Answers:
    """Start a server, have it answer, read its log, end it.

    Raises:
        EngineError: it does not start, or not answer.
    """
    with setup.running(name, stock=not name.endswith("plugin"), flags=flags, more=more) as server:
        wanted = answers.prompts(
            setup.vocabulary, answers.lengths_of(asked.requests, 0 if setup.is_cpu else asked.longs)
        )
        tokens = answers.greedy(server.client.url, wanted, asked.new_tokens, seconds=setup.clock.left_s())
        until = time.monotonic() + _STEPS_S
        while not (same := ranks.is_same(ranks.sampled(setup.record(name)), RANKS)) and time.monotonic() < until:
            time.sleep(0.2)
        log = setup.log(name).read_text(encoding="utf-8", errors="replace")
        return Answers(server.start_s, tokens, ranks.lines_of_ranks(log), same)


def judge(case: str, stock: Answers, plugin: Answers, control: Answers | None, *, needs_plan: bool) -> Row:
    """What holds of a case."""
    row = Row(case, same_in_ranks=stock.same_in_ranks and plugin.same_in_ranks)
    by_rank = {rank: [line for line in lines if _TABLE in line] for rank, lines in plugin.lines.items()}
    row.active = sum(any(_ACTIVE in line for line in lines) for lines in plugin.lines.values())
    row.tables = sorted({line for lines in by_rank.values() for line in lines})
    said = [line for lines in plugin.lines.values() for line in lines]
    loaded = sum(any(_LOADED in line for line in lines) for lines in plugin.lines.values())
    declined = next((line for line in said if _DECLINED in line), None)
    row.plan = f"loaded in {loaded} ranks" if loaded else declined or "none"
    row.agreement = answers.compare(stock.tokens, plugin.tokens)
    row.control = None if control is None else answers.compare(stock.tokens, control.tokens)
    wrong = {
        f"{row.active} of {RANKS} ranks say that the plugin is active": row.active != RANKS,
        "no table of the store was read": not row.tables,
        "the ranks name different tables": len({tuple(sorted(set(it))) for it in by_rank.values()}) != 1,
        "the stock server has the plugin": bool(stock.lines),
        "the ranks sampled different tokens": not row.same_in_ranks,
        "no rank runs the plan": needs_plan and loaded != RANKS,
        f"answers agree in {row.agreement}": not answers.is_equal_enough(row.agreement, row.control),
    }
    row.wrong = [text for text, is_so in wrong.items() if is_so]
    return row


def jobs(setup: Setup, asked: argparse.Namespace) -> dict[str, Callable[[], Answers]]:
    """A server each, by name."""
    place = forced_tables.here(is_cpu=setup.is_cpu)
    store, other = setup.out / "store", setup.out / "other_tile"
    forced_tables.write_store(store, shapes(setup), place)
    forced_tables.write(other / "configs", shapes(setup), place, config_table.parse_tile(OTHER_TILE), plan=None)
    graphs = () if setup.is_cpu else (*NO_GRAPHS, *MANY_RANKS)
    cpu = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if setup.is_cpu else {}
    found: dict[str, Callable[[], Answers]] = {}
    for case in asked.cases:
        kinds = {"stock": {}, "plugin": servers.with_store(store)}
        if case == asked.cases[0]:
            kinds["other_tile"] = {env.SGLANG_CONFIG_DIR: str(other)}
        for kind, more in kinds.items():
            name = f"{case}_{kind}"
            found[name] = _job(setup, name, asked, (*CASES[case], *graphs), {**cpu, **more})
    return found


def _job(
    setup: Setup, name: str, asked: argparse.Namespace, flags: Sequence[str], more: Mapping[str, str]
) -> Callable[[], Answers]:
    return lambda: ask(setup, name, asked, flags, more)


def rows(asked: argparse.Namespace, found: Mapping[str, Answers | EngineError], *, needs_plan: bool) -> list[Row]:
    """Of each case; a server that failed makes its case wrong."""
    told = []
    control = found.get(f"{asked.cases[0]}_other_tile")
    for case in asked.cases:
        stock, plugin = found[f"{case}_stock"], found[f"{case}_plugin"]
        failed = [str(it) for it in (stock, plugin) if isinstance(it, EngineError)]
        if isinstance(stock, EngineError) or isinstance(plugin, EngineError):
            told.append(Row(case, wrong=failed))
            continue
        try:
            of_case = control if isinstance(control, Answers) and case == asked.cases[0] else None
            told.append(judge(case, stock, plugin, of_case, needs_plan=needs_plan and case == "tp2"))
        except EngineError as error:
            told.append(Row(case, wrong=[str(error)]))
    return told


def table(told: Sequence[Row]) -> str:
    """The rows as markdown."""
    lines = [
        "| case | ranks active | plan | ranks sample the same | equal tokens with stock | of another tile with stock |",
        "|---|---:|---|---|---|---|",
    ]
    lines += [
        f"| {row.case} | {row.active} of {RANKS} | {row.plan} | {'yes' if row.same_in_ranks else 'no'} "
        f"| {row.agreement or '-'} | {row.control or '-'} |"
        for row in told
    ]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = servers.arguments(__doc__, seconds=200)
    arguments.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    arguments.add_argument("--requests", type=int, default=24)
    arguments.add_argument("--longs", type=int, default=4, help="requests of 1024 tokens among them (default 4)")
    arguments.add_argument("--new-tokens", type=int, default=8)
    arguments.add_argument("--at-a-time", type=int, default=5, help="servers beside each other (default 5)")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else list(words)
    asked = parser().parse_args(words)
    with tempfile.TemporaryDirectory() as scratch:
        setup = servers.prepare(asked, Path(scratch))
        place = forced_tables.here(is_cpu=setup.is_cpu)
        found = servers.at_once(jobs(setup, asked), at_a_time=asked.at_a_time)
        told = rows(asked, found, needs_plan=not setup.is_cpu)
    starts = {name: it.start_s for name, it in found.items() if isinstance(it, Answers)}
    print("started after s:", ", ".join(f"{name} {s:.0f}" for name, s in starts.items()) or "none")
    for row in told:
        print("\n".join(f"{row.case}: {line}" for line in row.tables))
    print("\n".join(f"WRONG: {row.case}: {line}" for row in told for line in row.wrong) or "every statement holds")
    print(f"\n{table(told)}")
    document = servers.circumstances(words, "benchmarks.real_servers.tensor_parallel", place)
    servers.save(asked.json, document | {"starts_s": starts, "cases": [asdict(row) for row in told]})
    return 1 if any(row.wrong for row in told) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MoEExtError as error:
        sys.exit(f"error: {error}")
