"""Does a whole vLLM server answer with the plugin as stock does? Its table is read, the guard works, our kernels run.

usage, from the repository root: python -m benchmarks.real_servers.vllm_server [--requests 24] [--new-tokens 8]
       [--compile] [--seconds 240] [--gpus 2] [--out FOLDER] [--json FILE]

Two servers (`vllm serve`) of a dummy Qwen3-30B-A3B of few layers beside each other, stock and with the plugin, whose
store has a table that nothing ships: at 64 to 256 tokens its configuration is one that no GPU has the memory for, and
between 512 and 4096 there is a kernel plan. `--compile` serves by torch.compile and CUDA graphs instead of eagerly.
Checked: the log says that the plugin is active and names the table, that the guard made a configuration smaller, and
that the plan is loaded; the answers agree with those of stock.
Needs vLLM 0.25.1 (tools/pack_vllm.sh and tools/pack_vllm_server.sh pack it) and a GPU with 80 GB; takes 2 minutes.
The status is 0 where all of that holds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.real_servers import answers, forced_tables, servers
from benchmarks.real_servers.answers import Agreement
from benchmarks.real_servers.servers import Clock, Setup
from benchmarks.serving import plugin_site
from sglang_moe_ext.core import EngineError, MoEExtError, MoEShape, Table
from sglang_moe_ext.engines.vllm import table_names
from sglang_moe_ext.untrusted import show

MODEL = "qwen3_30b_a3b"
SHAPE = MoEShape(128, 768, 2048, 8)
TABLE: Table = {m: forced_tables.TOO_LARGE if 64 <= m <= 256 else forced_tables.TILE for m in forced_tables.TOKENS}
SAYS = {
    "active": "is active in vLLM",
    "table": "your table",
    "guard": "of shared memory",
    "plan": "plans are loaded",
}
"""Words of our log lines, of each of which there must be one."""
_OURS = "sglang-moe-ext"


@dataclass(frozen=True, slots=True)
class Served:
    """Of one server: its answers, and our lines in its log, each once."""

    start_s: float
    tokens: list[list[int]]
    lines: tuple[str, ...]


def our_lines(log: str) -> tuple[str, ...]:
    """From our name on, without what the engine's logger puts before it."""
    found = (line[line.index(_OURS) :] for line in log.splitlines() if _OURS in line)
    return tuple(dict.fromkeys(found))


def greedy(url: str, model: str, wanted: Sequence[Sequence[int]], new_tokens: int, clock: Clock) -> list[list[int]]:
    """The likeliest tokens, one request after the other.

    Raises:
        EngineError: a request fails, or the time is over.
    """
    found = []
    for ids in wanted:
        exactly = {"max_tokens": new_tokens, "min_tokens": new_tokens, "ignore_eos": True, "temperature": 0}
        body = {"model": model, "prompt": list(ids), "return_token_ids": True, **exactly}
        limit_s = min(answers.ANSWER_S, max(clock.left_s(), 1.0))
        found.append(_ids(answers.generate(url, body, "/v1/completions", limit_s)))
    return found


def _ids(answer: Any) -> list[int]:
    try:
        ids = answer["choices"][0]["token_ids"]
    except (LookupError, TypeError):
        ids = None
    if not isinstance(ids, list) or not all(type(it) is int for it in ids):
        raise EngineError(f"the server answered {show(answer, 200)}, expected token_ids")
    return ids


def serve(setup: Setup, name: str, asked: argparse.Namespace, more: Mapping[str, str]) -> Served:
    """Start a server, have it answer, read its log, end it.

    Raises:
        EngineError: it does not start, or not answer.
    """
    flags = ("--no-enforce-eager", "--max-cudagraph-capture-size", "8") if asked.compile else ()
    with setup.running(name, stock=name == "stock", flags=flags, more=more) as server:
        wanted = answers.prompts(setup.vocabulary, answers.lengths_of(asked.requests, 4))
        tokens = greedy(server.client.url, str(setup.model), wanted, asked.new_tokens, setup.clock)
        return Served(server.start_s, tokens, our_lines(setup.log(name).read_text(encoding="utf-8", errors="replace")))


def judge(stock: Served, plugin: Served) -> tuple[Agreement, list[str]]:
    """How far the answers agree, and what does not hold.

    Raises:
        EngineError: they cannot be compared.
    """
    agreement = answers.compare(stock.tokens, plugin.tokens)
    wrong = [
        f"no line of the log says: {words}" for words in SAYS.values() if not any(words in it for it in plugin.lines)
    ]
    wrong += ["the stock server has the plugin"] if any(SAYS["active"] in it for it in stock.lines) else []
    wrong += [] if answers.is_equal_enough(agreement, None) else [f"equal tokens: {agreement}"]
    return agreement, wrong


def table(plugin: Served | None, agreement: Agreement | None) -> str:
    """What the log says, and how far the answers agree, as markdown."""
    lines = plugin.lines if plugin else ()
    said = " | ".join("yes" if any(words in it for it in lines) else "no" for words in SAYS.values())
    return "\n".join(
        [
            "| active | table read | guard at work | kernel plan loaded | equal tokens with stock |",
            "|---|---|---|---|---|",
            f"| {said} | {agreement or '-'} |",
        ]
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = servers.arguments(__doc__, seconds=240)
    arguments.add_argument("--requests", type=int, default=24)
    arguments.add_argument("--new-tokens", type=int, default=8)
    arguments.add_argument("--compile", action="store_true", help="torch.compile and CUDA graphs")
    arguments.add_argument("--gpus", type=int, default=1, help="GPUs to spread the two servers over (default 1)")
    return arguments


def prepare(asked: argparse.Namespace, scratch: Path) -> Setup:
    """The dummy model and the plugins' folder."""
    from benchmarks import dummy_model

    out = (asked.out or scratch / "out").absolute()
    out.mkdir(parents=True, exist_ok=True)
    plugin_site.write_for_vllm(scratch / "site")
    dummy_model.write(scratch / "model", MODEL, asked.layers)
    return Setup(scratch / "model", scratch / "site", out, Clock(asked.seconds), engine="vllm")


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else list(words)
    asked = parser().parse_args(words)
    if asked.cpu is not None:
        sys.exit("error: vLLM's wheel has no operators for a CPU: run this where there is a GPU")
    place = forced_tables.here(is_cpu=False)
    with tempfile.TemporaryDirectory() as scratch:
        setup = prepare(asked, Path(scratch))
        tables = setup.out / "store" / "tables" / "vllm"
        forced_tables.write(tables, [SHAPE], place, TABLE, naming=table_names.NAMING)
        kinds = {"stock": {}, "plugin": servers.with_store(setup.out / "store")}
        jobs = {
            name: servers.job(serve, setup, name, asked, {**servers.gpus_of(at, 1, asked.gpus), **more})
            for at, (name, more) in enumerate(kinds.items())
        }
        found = servers.at_once(jobs, at_a_time=2)
    stock, plugin = found["stock"], found["plugin"]
    agreement: Agreement | None = None
    if isinstance(stock, EngineError) or isinstance(plugin, EngineError):
        wrong = [f"{name}: {it}" for name, it in found.items() if isinstance(it, EngineError)]
    else:
        agreement, wrong = judge(stock, plugin)
        print(f"started after s: stock {stock.start_s:.0f}, plugin {plugin.start_s:.0f}")
        print("\n".join(plugin.lines))
    print("\n".join(f"WRONG: {line}" for line in wrong) or "every statement holds")
    print(f"\n{table(plugin if isinstance(plugin, Served) else None, agreement)}")
    document = servers.circumstances(words, "benchmarks.real_servers.vllm_server", place)
    results = {"lines": plugin.lines if isinstance(plugin, Served) else [], "wrong": wrong}
    servers.save(asked.json, document | results | {"agreement": agreement and asdict(agreement)})
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MoEExtError as error:
        sys.exit(f"error: {error}")
