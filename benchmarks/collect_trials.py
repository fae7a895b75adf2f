"""Time many configurations of a few layers on the GPU of this machine: the data that the wave model is held against.

usage: python benchmarks/collect_trials.py OUT [--per-batch 120] [--seconds 200]

Writes OUT/<layer>.jsonl, a line a trial: tokens, projection, configuration, microseconds (cold L2, best of 3).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import tempfile
import time
from pathlib import Path

from sglang_moe_ext import gpus
from sglang_moe_ext.core import PROJECTIONS, Failure, Gpu, MoEShape, Quantisation, TileConfig
from sglang_moe_ext.engines.sglang import installation
from sglang_moe_ext.tuning import predict, space
from sglang_moe_ext.tuning.compile import compile_all
from sglang_moe_ext.tuning.compile_cache import CompileCache
from sglang_moe_ext.tuning.sources import kernel_source
from sglang_moe_ext.tuning.worker import Check, Screen, Setup, Worker

LAYERS = {
    "glm_4_7_flash_bf16": MoEShape(65, 1536, 2048, 5, fused_shared=1),
    "qwen3_30b_a3b_fp8_block": MoEShape(128, 768, 2048, 8, Quantisation("fp8_w8a8", (128, 128))),
    "deepseek_v3_tp8_fp8_block": MoEShape(257, 256, 7168, 9, Quantisation("fp8_w8a8", (128, 128)), fused_shared=1),
}
TOKENS = (1, 8, 32, 128, 512, 1024, 4096, 16384)


def sample(shape: MoEShape, gpu: Gpu, tokens: int, size: int) -> list[TileConfig]:
    """The wave model's favourites, and as many at random: it is tested where it is sure and where it is not."""
    chance = random.Random(tokens)
    candidates = list(space.sift(space.full_space(), shape, gpu).kept)
    chance.shuffle(candidates)
    one_per_key = tuple({config.compile_key: config for config in candidates}.values())
    ranked = predict.by_estimate(one_per_key, shape, gpu, tokens)
    return ranked[: size // 2] + chance.sample(ranked[size // 2 :], size - size // 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--per-batch", type=int, default=120)
    parser.add_argument("--seconds", type=float, default=200.0, help="stop a layer after this many seconds")
    parser.add_argument("--layers", default=",".join(LAYERS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    gpu = gpus.detect()
    assert gpu is not None, "no GPU here"
    source = kernel_source(installation.find())
    for name in arguments.layers.split(","):
        shape = LAYERS[name]
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as triton_cache:
            chosen = {tokens: sample(shape, gpu, tokens, arguments.per_batch) for tokens in TOKENS}
            jobs = [
                job
                for tokens, configs in chosen.items()
                for config in configs
                for job in predict.jobs_of(config, shape, tokens, gpu.sm).values()
            ]
            compiled = compile_all(source, jobs, cache=CompileCache(None), triton_cache=Path(triton_cache))
            print(f"{name}: {len(compiled)} binaries in {time.monotonic() - start:.1f} s", flush=True)
            worker = Worker(Setup(shape, 0, Path(triton_cache)))
            begun = time.monotonic()
            count = failures = 0
            with (arguments.out / f"{name}.jsonl").open("w") as file:
                for tokens, configs in chosen.items():
                    for config in configs:
                        for projection in PROJECTIONS:
                            answer = worker.ask(Screen(tokens, projection, config, 3))
                            record: dict[str, object] = {
                                "tokens": tokens,
                                "projection": projection,
                                "config": dataclasses.astuple(config),
                            }
                            if isinstance(answer, Failure):
                                failures += 1
                                record["failure"] = answer.kind
                            else:
                                record["us"] = round(min(answer), 2)
                            file.write(json.dumps(record) + "\n")
                            count += 1
                    if time.monotonic() - begun > arguments.seconds:
                        break
            print(f"{name}: {count} trials, {failures} failed, {time.monotonic() - begun:.1f} s", flush=True)
            for tokens in (1, 17, 4096):
                config = chosen[1024][0]
                print(
                    name,
                    tokens,
                    "relative error",
                    worker.ask(Check(tokens, {"up": config, "down": config})),
                    flush=True,
                )
            worker.close()


if __name__ == "__main__":
    main()
