"""Pairs of servers, stock and with the plugin, that answer the same prompts: what each says and does.

The servers run beside each other on the same GPUs. A third one of the first case, stock with another tile, says how
far a tile alone changes answers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.real_servers import answers, forced_tables, ranks, servers
from benchmarks.real_servers.answers import Agreement
from benchmarks.real_servers.servers import Setup
from benchmarks.serving.outputs import OTHER_TILE
from sglang_moe_ext import env
from sglang_moe_ext.core import EngineError, MoEShape
from sglang_moe_ext.tables import config_table

_ACTIVE, _TABLE, _LOADED, _DECLINED = "is active in", "your table", "plans are loaded", "the engine's own kernels run"
_STEPS_S = 5.0


@dataclass(frozen=True, slots=True)
class Case:
    """How both servers of a pair are started, and what must then hold. `ranks`: processes that run layers.

    `needs_plan`: whether each rank must load the kernel plan, `needs_equal` whether the tokens must agree.
    """

    flags: tuple[str, ...]
    cpu_flags: tuple[str, ...] = ()
    ranks: int = 1
    needs_plan: bool = True
    needs_equal: bool = True


@dataclass(frozen=True, slots=True)
class Bench:
    """One command: its cases, the model that they serve, and the layers that tables are written for."""

    module: str
    cases: Mapping[str, Case]
    model: str
    shapes: tuple[MoEShape, ...]
    cpu_shapes: tuple[MoEShape, ...]
    cpu_settings: Mapping[str, str] = field(default_factory=dict)


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
    ranks: int
    active: int = 0
    tables: list[str] = field(default_factory=list)
    plan: str = "none"
    same_in_ranks: bool = False
    agreement: Agreement | None = None
    control: Agreement | None = None
    wrong: list[str] = field(default_factory=list)


def ask(
    setup: Setup, name: str, case: Case, asked: argparse.Namespace, more: Mapping[str, str], *, stock: bool
) -> Answers:
    """Start a server, have it answer, read its log, end it.

    Raises:
        EngineError: it does not start, or not answer.
    """
    flags = case.cpu_flags if setup.is_cpu else case.flags
    with setup.running(name, stock=stock, flags=flags, more=more) as server:
        lengths = answers.lengths_of(asked.requests, 0 if setup.is_cpu else asked.longs)
        wanted = answers.prompts(setup.vocabulary, lengths)
        tokens = answers.greedy(server.client.url, wanted, asked.new_tokens, seconds=setup.clock.left_s())
        until = time.monotonic() + _STEPS_S
        while not (same := ranks.is_same(ranks.sampled(setup.record(name)), case.ranks)) and time.monotonic() < until:
            time.sleep(0.2)
        log = setup.log(name).read_text(encoding="utf-8", errors="replace")
        return Answers(server.start_s, tokens, ranks.lines_of_ranks(log), same)


def judge(
    name: str, case: Case, stock: Answers, plugin: Answers, control: Agreement | None, *, is_cpu: bool = False
) -> Row:
    """What holds of a case; `control`: how far another tile alone changes answers.

    Raises:
        EngineError: the servers' answers cannot be compared.
    """
    row = Row(name, case.ranks, same_in_ranks=stock.same_in_ranks and plugin.same_in_ranks)
    by_rank = {rank: tuple(sorted({line for line in said if _TABLE in line})) for rank, said in plugin.lines.items()}
    row.active = _ranks_that_say(_ACTIVE, plugin)
    row.tables = sorted({line for said in by_rank.values() for line in said})
    loaded = _ranks_that_say(_LOADED, plugin)
    declined = (line for said in plugin.lines.values() for line in said if _DECLINED in line)
    row.plan = f"loaded in {loaded} of {case.ranks}" if loaded else next(declined, "none")
    row.agreement = answers.compare(stock.tokens, plugin.tokens)
    row.control = control
    wrong = {
        f"{row.active} of {case.ranks} ranks say that the plugin is active": row.active != case.ranks,
        "no table of the store was read": not row.tables,
        "the ranks name different tables": len(set(by_rank.values())) > 1,
        "the stock server has the plugin": bool(stock.lines),
        "the ranks sampled different tokens": not row.same_in_ranks,
        f"the kernel plan: {row.plan}": case.needs_plan and not is_cpu and loaded != case.ranks,
        f"equal tokens: {row.agreement}": case.needs_equal and not answers.is_equal_enough(row.agreement, row.control),
    }
    row.wrong = [text for text, is_so in wrong.items() if is_so]
    return row


def _ranks_that_say(words: str, server: Answers) -> int:
    return sum(any(words in line for line in lines) for lines in server.lines.values())


def jobs(setup: Setup, bench: Bench, asked: argparse.Namespace) -> dict[str, Callable[[], Answers]]:
    """A server each, by name; servers take the groups of GPUs in turn."""
    place = forced_tables.here(is_cpu=setup.is_cpu)
    shapes = bench.cpu_shapes if setup.is_cpu else bench.shapes
    store, other = setup.out / "store", setup.out / "other_tile"
    forced_tables.write_store(store, shapes, place)
    table = dict.fromkeys(forced_tables.TOKENS, config_table.parse_tile(OTHER_TILE))
    forced_tables.write(other / "configs", shapes, place, table, plan=None)
    kinds: dict[str, dict[str, str]] = {"stock": {}, "plugin": servers.with_store(store)}
    found: dict[str, Callable[[], Answers]] = {}
    for name in asked.cases:
        with_control = {"other_tile": {env.SGLANG_CONFIG_DIR: str(other)}} if name == asked.cases[0] else {}
        for kind, more in {**kinds, **with_control}.items():
            case = bench.cases[name]
            gpus = {} if setup.is_cpu else servers.gpus_of(len(found), case.ranks, asked.gpus)
            variables = {**(bench.cpu_settings if setup.is_cpu else {}), **gpus, **more}
            found[f"{name}_{kind}"] = servers.job(
                ask, setup, f"{name}_{kind}", case, asked, variables, stock=kind != "plugin"
            )
    return found


def rows(
    bench: Bench, asked: argparse.Namespace, found: Mapping[str, Answers | EngineError], *, is_cpu: bool
) -> list[Row]:
    """Of each case; a server that failed makes its case wrong."""
    first, other = (found.get(f"{asked.cases[0]}_{kind}") for kind in ("stock", "other_tile"))
    control = None
    if isinstance(first, Answers) and isinstance(other, Answers):
        control = answers.compare(first.tokens, other.tokens)
    told = []
    for name in asked.cases:
        stock, plugin, case = found[f"{name}_stock"], found[f"{name}_plugin"], bench.cases[name]
        if isinstance(stock, EngineError) or isinstance(plugin, EngineError):
            failed = {"stock": stock, "plugin": plugin}
            wrong = [f"{kind}: {it}" for kind, it in failed.items() if isinstance(it, EngineError)]
            told.append(Row(name, case.ranks, wrong=wrong))
            continue
        try:
            told.append(judge(name, case, stock, plugin, control, is_cpu=is_cpu))
        except EngineError as error:
            told.append(Row(name, case.ranks, wrong=[str(error)]))
    return told


def table(told: Sequence[Row]) -> str:
    """The rows as markdown."""
    lines = [
        "| case | ranks active | kernel plan | ranks sample the same | equal tokens with stock | with another tile |",
        "|---|---:|---|---|---|---|",
    ]
    lines += [
        f"| {row.case} | {row.active} of {row.ranks} | {row.plan} | {'yes' if row.same_in_ranks else 'no'} "
        f"| {row.agreement or '-'} | {row.control or '-'} |"
        for row in told
    ]
    return "\n".join(lines)


def parser(bench: Bench, doc: str | None, *, seconds: float, at_a_time: int) -> argparse.ArgumentParser:
    """The command line."""
    arguments = servers.arguments(doc, seconds=seconds)
    arguments.add_argument("--cases", nargs="+", choices=list(bench.cases), default=list(bench.cases))
    arguments.add_argument("--requests", type=int, default=24)
    arguments.add_argument("--longs", type=int, default=4, help="requests of 1024 tokens among them (default 4)")
    arguments.add_argument("--new-tokens", type=int, default=8)
    arguments.add_argument("--at-a-time", type=int, default=at_a_time, help="servers beside each other")
    arguments.add_argument("--gpus", type=int, help="GPUs to spread the servers over (default: those of one server)")
    return arguments


def main(bench: Bench, words: Sequence[str], arguments: argparse.ArgumentParser) -> int:
    """Run all servers; the table last. 0 where every statement holds."""
    asked = arguments.parse_args(words)
    with tempfile.TemporaryDirectory() as scratch:
        setup = servers.prepare(asked, Path(scratch), bench.model)
        place = forced_tables.here(is_cpu=setup.is_cpu)
        found = servers.at_once(jobs(setup, bench, asked), at_a_time=asked.at_a_time)
        told = rows(bench, asked, found, is_cpu=setup.is_cpu)
    starts = {name: round(it.start_s, 1) for name, it in found.items() if isinstance(it, Answers)}
    print("started after s:", ", ".join(f"{name} {s:.0f}" for name, s in starts.items()) or "none")
    print("\n".join(f"{row.case}: {line}" for row in told for line in row.tables))
    print("\n".join(f"WRONG: {row.case}: {line}" for row in told for line in row.wrong) or "every statement holds")
    print(f"\n{table(told)}")
    document = servers.circumstances(words, bench.module, place)
    servers.save(asked.json, document | {"starts_s": starts, "cases": [asdict(row) for row in told]})
    return 1 if any(row.wrong for row in told) else 0
