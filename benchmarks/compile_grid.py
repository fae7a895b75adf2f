"""Compile the grid of binaries for some architectures: the truth for the rules of tuning/search/space.py.

usage, from the repository root: python -m benchmarks.compile_grid OUT [sm_90 gfx942 ...]    (3 minutes each on 2 cores)

Writes OUT/<architecture>_<scheme>.jsonl, a line a binary: block sizes, warps, stages, and what it needs. Left out is
only what cannot run whatever the compiler does: more shared memory in one pipeline stage fewer than a block may have.
Of AMD's larger space a share, the same each time.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import astuple
from pathlib import Path

from sglang_moe_ext.cli.console import Bar
from sglang_moe_ext.core import CompileJob, CompileKey, Failure, MoEShape, Quantization, Target
from sglang_moe_ext.engines.registry import SGLANG
from sglang_moe_ext.gpu.specs import known_gpus
from sglang_moe_ext.tuning.compile.cache import CompileCache
from sglang_moe_ext.tuning.compile.kernel_source import kernel_source
from sglang_moe_ext.tuning.compile.pool import compile_all
from sglang_moe_ext.tuning.search import rocm_space, space

LAYERS = {
    "bf16": MoEShape(128, 768, 2048, 8),
    "fp8_block": MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", (128, 128))),
}
TOKENS = 1024
IN_DOUBT = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
TENSOR_MEMORY = (100, 103)
MOST_REGISTERS = 256
AMD_SHARE = 4
"""One key of so many is compiled for AMD GPUs, which have 500 of them and compile some for twenty seconds."""


def keys(shape: MoEShape, target: Target) -> list[CompileKey]:
    """The keys whose truth is in doubt."""
    gpu = next(gpu for gpu in known_gpus().values() if gpu.target == target)
    size = shape.quantization.activation_bits // 8
    found = set()
    for config in rocm_space.full_space(shape, gpu) if target.is_amd else space.full_space():
        stages = (config.num_stages - 1) * (config.block_m + config.block_n) * config.block_k * size
        too_wide = space.accumulator_registers(config, target) > MOST_REGISTERS and target.sm not in TENSOR_MEMORY
        misfit = shape.quantization.is_block_wise and 128 % config.block_k
        if stages <= gpu.smem_per_block and not too_wide and not misfit:
            found.add(config.compile_key)
    in_doubt = sorted(found)
    return sorted(random.Random(0).sample(in_doubt, len(in_doubt) // AMD_SHARE)) if target.is_amd else in_doubt


def target_named(name: str) -> Target:
    """From sm_90 or gfx942 to what it means."""
    return Target(int(name.removeprefix("sm_"))) if name.startswith("sm_") else Target(gfx=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("target", nargs="*", choices=IN_DOUBT, metavar="ARCHITECTURE")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    source = kernel_source(SGLANG.find(), SGLANG)
    for target in map(target_named, arguments.target or IN_DOUBT):
        for name, shape in LAYERS.items():
            jobs = {key: CompileJob(shape, "up", TOKENS, key, target) for key in keys(shape, target)}
            with Bar() as bar:
                compiled = compile_all(
                    source,
                    list(jobs.values()),
                    cache=CompileCache(None),
                    progress=lambda done, of, stage=f"{target} {name}": bar(stage, done, of),  # type: ignore[misc]
                )
            with (arguments.out / f"{target}_{name}.jsonl").open("w", encoding="utf-8") as file:
                for key, job in jobs.items():
                    result = compiled[job]
                    record: dict[str, object] = {"key": astuple(key)[:5]}
                    if isinstance(result, Failure):
                        record |= {"failure": result.kind, "message": result.message}
                    else:
                        record |= {"smem": result.smem_bytes, "regs": result.registers, "spill": result.spill_bytes}
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
