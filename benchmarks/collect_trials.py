"""Time many configurations of a few layers on the GPU of this machine: the data that the wave model is held against.

usage, from the repository root: python -m benchmarks.collect_trials OUT [--per-batch 120] [--seconds 200]

Writes OUT/<layer>.jsonl, a line a trial: tokens, projection, configuration, microseconds (cold L2, uniform routing,
best of 3).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.racing import here
from sglang_moe_ext.core import PROJECTIONS, Gpu, MoEExtError, MoEShape, Quantization, TileConfig
from sglang_moe_ext.engines.registry import SGLANG
from sglang_moe_ext.tuning.bench import routing
from sglang_moe_ext.tuning.bench.gpu_bench import BenchSetup
from sglang_moe_ext.tuning.bench.messages import BenchGemm, CheckAccuracy, GemmTimes, Measure, Pair
from sglang_moe_ext.tuning.bench.worker import BenchProcess
from sglang_moe_ext.tuning.compile.cache import CompileCache
from sglang_moe_ext.tuning.compile.kernel_source import kernel_source
from sglang_moe_ext.tuning.compile.pool import compile_all
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.search import candidates, predict, space

LAYERS = {
    "glm_4_7_flash_bf16": MoEShape(65, 1536, 2048, 5, fused_shared=1),
    "qwen3_30b_a3b_fp8_block": MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", (128, 128))),
    "deepseek_v3_tp8_fp8_block": MoEShape(257, 256, 7168, 9, Quantization("fp8_w8a8", (128, 128)), fused_shared=1),
}
TOKENS = (1, 8, 32, 128, 512, 1024, 4096, 16384)
CHECKED = (1, 17, 4096)
SAMPLES = 3

Record = dict[str, object]
"""One trial, as its line says it."""


def sample(shape: MoEShape, gpu: Gpu, tokens: int, size: int) -> list[TileConfig]:
    """The wave model's favourites, and as many at random: it is tested where it is sure and where it is not."""
    chance = random.Random(tokens)
    kept = list(space.prune(space.full_space(), shape, gpu).kept)
    chance.shuffle(kept)
    one_per_key = tuple({config.compile_key: config for config in kept}.values())
    ranked = predict.by_estimate(one_per_key, Problem(shape, gpu, "sglang"), tokens)
    favourites, others = ranked[: size // 2], ranked[size // 2 :]
    return favourites + chance.sample(others, min(size - size // 2, len(others)))


def compiled(chosen: dict[int, list[TileConfig]], shape: MoEShape, gpu: Gpu, triton_cache: Path) -> int:
    """Make the binaries of all trials; how many they are."""
    jobs = {
        job: None
        for tokens, configs in chosen.items()
        for job in candidates.screening_jobs(dict.fromkeys(PROJECTIONS, configs), Problem(shape, gpu, "sglang"), tokens)
    }
    source = kernel_source(SGLANG.find(), SGLANG)
    return len(compile_all(source, list(jobs), cache=CompileCache(None), triton_cache=triton_cache))


def trials(chosen: dict[int, list[TileConfig]], measure: Measure, seconds: float) -> Iterator[Record]:
    """A record of each trial; no new batch size is begun after so many seconds."""
    until = time.monotonic() + seconds
    for tokens, configs in chosen.items():
        if time.monotonic() > until:
            return
        for config in configs:
            for projection in PROJECTIONS:
                answer = measure(BenchGemm(tokens, projection, config.compile_key, (config.group_m,), SAMPLES))
                record: Record = {
                    "tokens": tokens,
                    "projection": projection,
                    "config": dataclasses.astuple(config),
                }
                if isinstance(answer, GemmTimes):
                    yield record | {"us": round(min(answer.us[0]), 2)}
                else:
                    yield record | {"failure": getattr(answer, "kind", type(answer).__name__)}


def collect(name: str, gpu: Gpu, per_batch: int, seconds: float, out: Path) -> None:
    """Write the file of one layer, and say whether what was timed is right."""
    shape = LAYERS[name]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        chosen = {tokens: sample(shape, gpu, tokens, per_batch) for tokens in TOKENS}
        binaries = compiled(chosen, shape, gpu, Path(folder))
        print(f"{name}: {binaries} binaries in {time.monotonic() - begun:.1f} s", flush=True)
        worker = BenchProcess(BenchSetup(shape, routing.UNIFORM, 0, Path(folder), "sglang"))
        try:
            begun = time.monotonic()
            count = failures = 0
            with (out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                for record in trials(chosen, worker.measure, seconds):
                    file.write(json.dumps(record) + "\n")
                    count += 1
                    failures += "failure" in record
            print(f"{name}: {count} trials, {failures} failed, {time.monotonic() - begun:.1f} s", flush=True)
            config = chosen[1024][0]
            pair: Pair = {"up": config, "down": config}
            for tokens in CHECKED:
                print(f"{name} {tokens} relative error {worker.measure(CheckAccuracy(tokens, pair))}", flush=True)
        finally:
            worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--per-batch", type=int, default=120)
    parser.add_argument("--seconds", type=float, default=200.0, help="stop a layer after this many seconds")
    parser.add_argument("--layers", default=",".join(LAYERS))
    arguments = parser.parse_args()
    gpu, _ = here()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.layers.split(","):
        collect(name, gpu, arguments.per_batch, arguments.seconds, arguments.out)


if __name__ == "__main__":
    try:
        main()
    except MoEExtError as error:
        sys.exit(f"error: {error}")
