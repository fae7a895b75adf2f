"""What each rank of a server says in its log, and which tokens it sampled.

A plugin of this benchmark's (`register`) writes down what the engine's sampler returns, in each rank.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sglang_moe_ext import import_hook

RECORD = "REAL_SERVERS_RECORD"
"""The folder that gets a file for each rank."""
SAMPLER = "sglang.srt.layers.sampler"
ENTRY_POINT = {"record_sampled": "benchmarks.real_servers.ranks:register"}
_LINE = re.compile(r".*\[\d{4}-\d\d-\d\d [\d:]+(?P<tags>(?: [A-Z]+\d+)*)\] (?P<text>.*)")
_RANK = re.compile(r" TP(\d+)")
_OURS = "sglang-moe-ext"


def lines_of_ranks(log: str) -> dict[int, list[str]]:
    """Our lines by the rank whose log they are in; a server of one rank marks none, and is rank 0."""
    found: dict[int, list[str]] = {}
    for line in log.splitlines():
        match = _LINE.match(line)
        if match and match["text"].startswith(_OURS):  # a folder of that name stands in lines of the engine's
            rank = _RANK.search(match["tags"])
            found.setdefault(int(rank[1]) if rank else 0, []).append(match["text"])
    return found


def register() -> None:
    """Entry point: only the processes that sample need it."""
    if not os.environ.get(RECORD):
        return
    if SAMPLER in sys.modules:
        _watch(sys.modules[SAMPLER])
    else:
        import_hook.on_import(SAMPLER, _watch)


def _watch(module: Any) -> None:
    original = module.Sampler.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        tokens = original(*args, **kwargs)
        rank = importlib.import_module("torch.distributed").get_rank()
        with open(Path(os.environ[RECORD]) / f"rank{rank}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(tokens.tolist()) + "\n")
        return tokens

    module.Sampler.forward = forward


def sampled(folder: Path) -> dict[int, list[list[int]]]:
    """The tokens of each step by rank."""
    return {rank: [json.loads(line) for line in lines] for rank, lines in _files(folder)}


def _files(folder: Path) -> Iterator[tuple[int, list[str]]]:
    for path in sorted(folder.glob("rank*.jsonl")):
        written, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
        yield int(path.stem.removeprefix("rank")), written.splitlines()


def is_same(steps: dict[int, list[list[int]]], ranks: int) -> bool:
    """Whether so many ranks sampled the same tokens in all steps."""
    first, *others = steps.values() if len(steps) == ranks else ([],)
    return bool(first) and all(other == first for other in others)
