"""Judge the wave model on AMD GPUs by the tables that SGLang and vLLM ship for them, as markdown. Needs no GPU.

usage, with an engine on the path: python -m benchmarks.amd_shipped_tables [--worst N]    (4 minutes)

Each shipped entry was found on the real GPU by the engine's own tuner. Where does the model rank its tile among the
candidates, and how much slower than its own first does it believe it to be? A tile is its sides and its warps;
GROUP_SIZE_M and Triton's options are left to the best, since the model ranks none of the options.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext.core import CompileKey, GpuError, MoEShape, TableError, TileConfig
from sglang_moe_ext.engines.adapter import EngineName
from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.engines.sglang import installation as sglang
from sglang_moe_ext.engines.vllm import installation as vllm
from sglang_moe_ext.stock import given_table
from sglang_moe_ext.tuning import tune_plan
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.search import predict

FIRST = 10
CHOSEN_ON = frozenset({1, 8, 32, 128, 512, 2048, 4096})
"""Numbers of tokens at which every second table of an MI300X decided on three constants of `gpu_family.CDNA`."""
FEW_TOKENS = 64
"""Up to here memory decides, and most tiles are near the best."""
Sides = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class JudgedEntry:
    """One shipped entry: the rank of its tile, from 0, among so many, and by how much the model thinks it slower.

    `rank` None: the rules drop it. `same_blocks`: a tile of the same sides is among the first, with whatever warps.
    """

    table: str
    tokens: int
    shipped: TileConfig
    first: TileConfig
    rank: int | None
    among: int
    same_blocks: bool
    loss: float


def sides(config: TileConfig | CompileKey) -> Sides:
    """What of a configuration the model tells apart."""
    return config.block_m, config.block_n, config.block_k, config.num_warps


def shipped_tables() -> Iterator[tuple[Path, Problem]]:
    """The tables for GPUs that are known, each with the first layer of a built-in model that asks for it."""
    folders: dict[EngineName, Path] = {}
    if (of_sglang := sglang.find()) is not None:
        folders["sglang"] = of_sglang.configs_root
    if (of_vllm := vllm.find()) is not None:
        folders["vllm"] = of_vllm.configs_folder
    for engine in ENGINES:
        for path in sorted(folders[engine].rglob("E=*,device_name=AMD_*.json")) if engine in folders else ():
            found = _problem(path, engine)
            if isinstance(found, Problem):
                yield path, found
            else:
                print(f"<!-- left out: {found} -->")


def _problem(path: Path, engine: EngineName) -> Problem | str:
    """What the table is for, or why that is not known."""
    try:
        given = given_table.read(path)
        layers = given_table.fitting_layers(given.key, engine)
        return Problem(layers[0].shape, given.gpu, engine) if layers else f"no built-in model asks for {path.name}"
    except (TableError, GpuError) as error:
        return str(error)


def judge(path: Path, problem: Problem) -> Iterator[JudgedEntry]:
    """Its entries, each against the model's ranking at its number of tokens."""
    kept = tune_plan.prune_space(problem).kept
    for tokens, written in given_table.read(path).table.items():
        shipped = problem.adapter.effective_config(written, problem.shape.quantization)
        ranked = predict.best_of_each_key(kept, problem, tokens)
        ranks = {sides(config): rank for rank, config in enumerate(ranked)}
        best_us = predict.estimate_us(ranked[0], problem, tokens)
        in_front = [config for config in ranked[:FIRST] if sides(config)[:3] == sides(shipped)[:3]]
        yield JudgedEntry(
            table=f"{problem.engine} {path.name}",
            tokens=tokens,
            shipped=shipped,
            first=ranked[0],
            rank=ranks.get(sides(shipped)),
            among=len(ranked),
            same_blocks=bool(in_front),
            loss=predict.estimate_us(shipped, problem, tokens) / best_us - 1,
        )


def _kind(shape: MoEShape) -> str:
    return str(shape.quantization.scheme or "16 bits")


def summary(name: str, judged: Sequence[JudgedEntry]) -> str:
    """One row."""
    ranked = [entry.rank for entry in judged if entry.rank is not None]
    by_chance = statistics.fmean(FIRST / entry.among for entry in judged)
    losses = sorted(entry.loss for entry in judged)
    mean_loss = math.exp(statistics.fmean(map(math.log1p, losses))) - 1
    return (
        f"| {name} | {len(judged)} | {sum(rank < FIRST for rank in ranked) / len(judged):.0%} | {by_chance:.0%} "
        f"| {sum(entry.same_blocks for entry in judged) / len(judged):.0%} "
        f"| {statistics.median(ranked):.0f} of {statistics.median(entry.among for entry in judged):.0f} "
        f"| {mean_loss:.1%} | {losses[int(0.9 * len(losses))]:.1%} | {len(judged) - len(ranked)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worst", type=int, default=0, metavar="N", help="print the N entries that it ranks worst")
    arguments = parser.parse_args()
    judged: dict[str, list[JudgedEntry]] = {}
    of_an_mi300x = 0
    for path, problem in shipped_tables():
        decided = problem.gpu.device_name == "AMD Instinct MI300X" and of_an_mi300x % 2 == 0
        of_an_mi300x += problem.gpu.device_name == "AMD Instinct MI300X"
        for entry in judge(path, problem):
            use = "decided on constants" if decided and entry.tokens in CHOSEN_ON else "did not"
            size = f"M <= {FEW_TOKENS}" if entry.tokens <= FEW_TOKENS else f"M > {FEW_TOKENS}"
            for name in ("all", use, problem.engine, problem.gpu.device_name, _kind(problem.shape), size):
                judged.setdefault(name, []).append(entry)
    print(
        f"| tables | entries | shipped tile in the first {FIRST} | by chance | same blocks in the first {FIRST} "
        "| median rank | thought slower, mean | 90th percentile | dropped by a rule |"
    )
    print("|---" * 9 + "|")
    print(*(summary(name, entries) for name, entries in judged.items()), sep="\n")
    for entry in sorted(judged["all"], key=lambda entry: -entry.loss)[: arguments.worst]:
        print(f"{entry.table} M={entry.tokens}: {entry.shipped}, first {entry.first}, {entry.loss:.0%} slower")


if __name__ == "__main__":
    main()
