"""Does SGLang crash on a card with little shared memory, and not with the plugin? Simulated on a big one.

usage, from the repository root: python -m benchmarks.small_card [--limit 101376] [--serve] [--out FOLDER]

Runs the engine's own fused-MoE layer for M from 1 to 16,384 under that limit, stock and with the plugin, each in a
process of its own, and holds what comes out against a float32 reference; --serve prefills 4,096 tokens of an 8-layer
GLM-4.7-Flash too. Exits with 1 where the plugin fails or is wrong. Needs SGLang 0.5.15 and a GPU; 101,376 bytes are
what a block has on sm_86, sm_89 and sm_120.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks.serving import small_card_report
from benchmarks.serving.children import Child, environment, running
from benchmarks.serving.served_model import Plan
from benchmarks.serving.small_card_report import Ran, Row, Served
from benchmarks.serving.workloads import TOKENS, WORKLOADS, write_tables
from benchmarks.serving_speed import CHILD, refuse_impostor
from benchmarks.vs_upstream.report import Place, here
from sglang_moe_ext import env
from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.engines.sglang import installation

LAYER_CHILD = "benchmarks.serving.layer_child"
NAMES = ("stock", "plugin")
_SERVED_TOKENS, _SERVED_LAYERS = 4096, 8

Start = Callable[[str, str], Child]
"""The child of that name, stock or plugin, that runs that module."""


def starter(scratch: Path, out: Path) -> Start:
    """Children that find the workloads' tables where a user would name them, and an empty store."""
    more = {env.SGLANG_CONFIG_DIR: str(scratch / "tables"), env.STORE: str(scratch / "store")}

    def start(name: str, module: str) -> Child:
        log = out / f"{name}_{module.rpartition('.')[2]}.log"
        return Child(name, running(module), environment(stock=name == "stock", more=more), log)

    return start


def layers(limit: int, start: Start) -> list[Row]:
    """Every workload at every M, in a child without the plugin and in one with it.

    Raises:
        EngineError: a child dies, or is not what its name says.
    """
    ran: dict[str, dict[tuple[int, int], Ran]] = {}
    for name in NAMES:
        child = start(name, LAYER_CHILD)
        try:
            refuse_impostor(name, is_active=child.ask("load", limit=limit)["active"], child=child)
            ran[name] = {}
            for number in range(len(WORKLOADS)):
                child.ask("layer", workload=number)
                for tokens in TOKENS:
                    ran[name][number, tokens] = Ran.of(child.ask("run", tokens=tokens))
        finally:
            child.close()
    return [
        Row(workload, tokens, *(ran[name][number, tokens] for name in NAMES))
        for number, workload in enumerate(WORKLOADS)
        for tokens in TOKENS
    ]


def served(limit: int, folder: Path, start: Start) -> dict[str, Served]:
    """The whole model's prefill, by child. What the engine raises is an answer.

    Raises:
        EngineError: a child dies, or is not what its name says.
    """
    plan = Plan(str(folder), "spread", _SERVED_TOKENS * 2, (), 32)
    found = {}
    for name in NAMES:
        child = start(name, CHILD)
        try:
            loaded = child.ask("load", plan=asdict(plan), limit=limit)
            refuse_impostor(name, is_active=loaded["active"], child=child)
            found[name] = _prefilled(child)
        finally:
            child.close()
    return found


def _prefilled(child: Child) -> Served:
    taken = []
    for number in range(2):  # the first compiles
        answer = child.answer("run", kind="prefill", size=_SERVED_TOKENS, seed=number)
        if "error" in answer:
            return Served(failure=answer["error"])
        taken.append(float(answer["ms"]))
    return Served(tuple(taken))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--limit", type=int, default=101376, metavar="BYTES")
    arguments.add_argument("--serve", action="store_true", help="a whole model too")
    arguments.add_argument("--out", type=Path, help="keep the children's logs there")
    return arguments


def told(place: Place, limit: int, rows: list[Row], of_models: dict[str, Served]) -> bool:
    """Print all of it; true where the plugin ran everything, and right."""
    print(f"{small_card_report.header(place, limit)}\n\n{small_card_report.table(rows)}")
    if of_models:
        print(f"\nPrefill of {_SERVED_TOKENS:,} tokens of GLM-4.7-Flash bf16, {_SERVED_LAYERS} layers:\n")
        print("\n".join(f"- {name}: {of_child}" for name, of_child in of_models.items()))
    print(json.dumps(small_card_report.document(place, limit, rows, of_models)))
    runs = all(row.plugin.is_right(row.workload) for row in rows)
    return runs and all(of_child.failure is None for name, of_child in of_models.items() if name == "plugin")


def main() -> int:
    asked = parser().parse_args()
    place = here(shlex.join(["python", "-m", "benchmarks.small_card", *sys.argv[1:]]))
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        out = asked.out or scratch
        out.mkdir(parents=True, exist_ok=True)
        write_tables(scratch / "tables", place.gpu.device_name, installation.running_triton() or "")
        start = starter(scratch, out)
        rows = layers(asked.limit, start)
        of_models: dict[str, Served] = {}
        if asked.serve:
            from benchmarks import dummy_model

            dummy_model.write(scratch / "model", "glm_4_7_flash", _SERVED_LAYERS)
            of_models = served(asked.limit, scratch / "model", start)
        return 0 if told(place, asked.limit, rows, of_models) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MoEExtError as error:
        sys.exit(f"error: {error}")
