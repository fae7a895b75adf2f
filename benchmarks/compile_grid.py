"""Compile the grid of binaries for some architectures: the truth for the rules of tuning/search/space.py.

usage, from the repository root: python -m benchmarks.compile_grid OUT [SM ...]    (3 minutes an SM on 2 cores)

Writes OUT/sm_<SM>_<scheme>.jsonl, a line a binary: block sizes, warps, stages, and what it needs. Left out is only what
cannot run whatever the compiler does: more shared memory in one pipeline stage fewer than a block may have.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import astuple
from pathlib import Path

from sglang_moe_ext.cli.console import Bar
from sglang_moe_ext.core import CompileJob, CompileKey, Failure, MoEShape, Quantization
from sglang_moe_ext.engines.registry import SGLANG
from sglang_moe_ext.gpu.specs import ARCHITECTURES
from sglang_moe_ext.tuning.compile.cache import CompileCache
from sglang_moe_ext.tuning.compile.kernel_source import kernel_source
from sglang_moe_ext.tuning.compile.pool import compile_all
from sglang_moe_ext.tuning.search import space

LAYERS = {
    "bf16": MoEShape(128, 768, 2048, 8),
    "fp8_block": MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", (128, 128))),
}
TOKENS = 1024
ARCHITECTURES_IN_DOUBT = (80, 86, 89, 90, 100, 120)
TENSOR_MEMORY = (100, 103)
MOST_REGISTERS = 256


def keys(shape: MoEShape, sm: int) -> list[CompileKey]:
    """The keys whose truth is in doubt."""
    size = shape.quantization.activation_bits // 8
    found = set()
    for config in space.full_space():
        stages = (config.num_stages - 1) * (config.block_m + config.block_n) * config.block_k * size
        too_wide = space.accumulator_registers(config) > MOST_REGISTERS and sm not in TENSOR_MEMORY
        misfit = shape.quantization.is_block_wise and 128 % config.block_k
        if stages <= ARCHITECTURES[sm].smem_per_block and not too_wide and not misfit:
            found.add(config.compile_key)
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("sm", type=int, nargs="*", metavar="SM")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    source = kernel_source(SGLANG.find(), SGLANG)
    for sm in arguments.sm or ARCHITECTURES_IN_DOUBT:
        for name, shape in LAYERS.items():
            jobs = {key: CompileJob(shape, "up", TOKENS, key, sm) for key in keys(shape, sm)}
            with Bar() as bar:
                compiled = compile_all(
                    source,
                    list(jobs.values()),
                    cache=CompileCache(None),
                    progress=lambda done, of, stage=f"sm_{sm} {name}": bar(stage, done, of),  # type: ignore[misc]
                )
            with (arguments.out / f"sm_{sm}_{name}.jsonl").open("w", encoding="utf-8") as file:
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
