"""How much faster is vLLM's own fused-MoE layer with a tuned table than with what it ships?

usage, from the root: python -m benchmarks.vllm_layer OUT [--layers NAME ...] [--batch-size M ...] [--budget S]

Each layer is tuned (`tune --engine vllm --save-dir`); then its table is raced beside what vLLM takes without it, one
that it ships or its default: whole layers (`fused_experts`: quantization, sort, up, activation, down, sum) in turn,
cold L2 before each, uniform and Zipf routing, on data that the tuning has not seen. Needs vLLM 0.20 or newer and a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_moe_ext import env
from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.engines.registry import VLLM

LAYERS: Mapping[str, tuple[str, ...]] = {
    "GLM-4.7-Flash bf16": ("--model", "GLM-4.7-Flash"),
    "Qwen3-30B-A3B bf16": ("--model", "Qwen3-30B-A3B"),
    "Qwen3-30B-A3B fp8 block": ("--shape", "E=128,N=768,K=2048,topk=8,dtype=fp8_w8a8,block_shape=[128,128]"),
}
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
_RACE_SEED = "1"


def tune(arguments: Sequence[str], out: Path, log: Path) -> dict[str, Any]:
    """The document of the tune command, run in a process of its own.

    Raises:
        MoEExtError: it fails.
    """
    environment = {**os.environ, env.STORE: str(out / "store")}
    with log.open("a", encoding="utf-8") as errors:
        command = [sys.executable, "-W", "ignore", "-m", "sglang_moe_ext.tune", "--engine", "vllm"]
        command += ["--json", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, check=False)
        errors.write(done.stdout)
    if done.returncode != 0:
        raise MoEExtError(f"{' '.join(arguments)} failed: {log.read_text(encoding='utf-8').strip().splitlines()[-1]}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def raced(layer: Sequence[str], tokens: Sequence[int], budget: float, out: Path, log: Path) -> list[dict[str, Any]]:
    """The layer tuned, and then its table beside what vLLM takes without it, at each M."""
    batch = ("--batch-size", *map(str, tokens))
    tables = out / "tables"
    tuned = tune((*layer, *batch, "--budget", str(budget), "--save-dir", str(tables)), out, log)
    table = next((path for path in tuned["written"] if Path(path).parent == tables), None)
    if table is None:
        raise MoEExtError(f"{' '.join(layer)}: tune wrote no table into {tables}: {log} says why")
    found = tune((*layer, *batch, "--cmp-configs", table, "--seed", _RACE_SEED), out, log)
    comparisons: list[dict[str, Any]] = found["comparisons"]
    return comparisons


def rows(name: str, comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each M."""
    lines = []
    for of_m in comparisons:
        stock, tuned = of_m["choices"]
        if stock["us"] is None or tuned["us"] is None:
            lines.append(
                f"| {name} | {of_m['m']} | {stock['us']} | {tuned['us']} | {stock['failure'] or tuned['failure']} |"
            )
            continue
        gain = f"{tuned['gain']:.3f} [{tuned['low']:.3f}, {tuned['high']:.3f}]"
        right = "" if tuned["right"] and stock["right"] else f", WRONG {stock['error']} {tuned['error']}"
        lines.append(f"| {name} | {of_m['m']} | {stock['us']:.1f} | {tuned['us']:.1f} | {gain}{right} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", nargs="+", choices=tuple(LAYERS), default=tuple(LAYERS))
    parser.add_argument("--batch-size", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of the search of each layer")
    arguments = parser.parse_args()
    engine = VLLM.find()
    if engine is None:
        print(
            "error: vLLM is not installed here: put it on PYTHONPATH, as tools/unpack_engine.sh does", file=sys.stderr
        )
        return 1
    out, failed = arguments.out.absolute(), False
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    print(f"vLLM {engine.version_text}, Triton {engine.triton}: whole layer, us; gain of the tuned table over stock")
    print("| layer | M | stock | tuned | gain, 95 % interval |\n|---|---|---|---|---|", flush=True)
    for name in arguments.layers:
        began = time.monotonic()
        try:
            found[name] = raced(LAYERS[name], arguments.batch_size, arguments.budget, out, out / "tune.log")
            print("\n".join(rows(name, found[name])), flush=True)
        except MoEExtError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
        (out / "vllm_layer.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
