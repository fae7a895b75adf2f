"""How good the wave model's ranking is: regret against measurements, per layer and number of tokens, as markdown.

usage: python -m benchmarks.prediction_regret [--trials DIR] [--leave-one-out]

Regret is the measured time of what the model ranks first among the measured configurations, over the best measured
time, less one; one configuration serves both GEMMs. --leave-one-out fits the constants anew to all layers but one,
from a start that is off by half, and prints the regret on the one left out (2 minutes).
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.collect_trials import LAYERS
from sglang_moe_ext.core import PROJECTIONS, Gpu, Projection, Resources, TileConfig
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.tuning.search import cost_model, gpu_family

TRIALS = Path(__file__).parent.parent / "tests/data/trials/h200_sglang_0_5_15_triton_3_6_0"
GPU = find_gpu("H200")
SHORTLIST = 8
FITTED = (
    "launch_us",
    "block_start_us",
    "warp_start_us",
    "load_latency_us",
    "step_us",
    "scale_us",
    "l2_gbs",
    "short_row_share",
    "mma_sync_share",
)
_ROUNDS = 600
"""Random steps of a fit."""


@dataclass(frozen=True, slots=True)
class Cell:
    """The measured configurations of one layer at one number of tokens, microseconds of the up and the down GEMM."""

    layer: str
    tokens: int
    pairs: dict[TileConfig, dict[Projection, float]]
    resources: dict[TileConfig, Resources]

    def measured_us(self, config: TileConfig) -> float:
        return sum(self.pairs[config].values())

    @property
    def best(self) -> TileConfig:
        return min(self.pairs, key=self.measured_us)

    def predicted_us(self, config: TileConfig, gpu: Gpu = GPU) -> float:
        resources = dict.fromkeys(PROJECTIONS, self.resources[config])
        return cost_model.pair_us(config, LAYERS[self.layer], gpu, self.tokens, resources)

    def ranked(self) -> list[TileConfig]:
        """Predicted fastest first; of equals the smaller, as the tuner takes it."""
        return sorted(self.pairs, key=lambda config: (self.predicted_us(config), config))

    def regret(self, configs: Sequence[TileConfig]) -> float:
        """Of the best of these configurations."""
        return min(map(self.measured_us, configs)) / self.measured_us(self.best) - 1

    def default(self) -> TileConfig | None:
        """What the engine takes without a table, if it was measured; GROUP_SIZE_M aside."""
        shape = LAYERS[self.layer]
        if shape.quantization.is_block_wise:
            tile = (64, 128, 128, 4, 3)
        else:
            tile = (64, 64, 32, 4, 3) if self.tokens > shape.experts else (16, 32, 64, 4, 3)
        keys = {config: config.compile_key for config in self.pairs}
        fields = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
        return next((c for c, key in keys.items() if tuple(getattr(key, field) for field in fields) == tile), None)


def cells(trials: Path = TRIALS) -> list[Cell]:
    """The trials as cells, in the order of the layers and the batch sizes. What failed is left out."""
    found: list[Cell] = []
    for layer, shape in LAYERS.items():
        by_tokens: dict[int, dict[TileConfig, dict[Projection, float]]] = {}
        for line in (trials / f"{layer}.jsonl").read_text().splitlines():
            record = json.loads(line)
            if "us" in record:
                pairs = by_tokens.setdefault(record["tokens"], {})
                pairs.setdefault(TileConfig(*record["config"]), {})[record["projection"]] = record["us"]
        for tokens, pairs in by_tokens.items():
            whole = {config: pair for config, pair in pairs.items() if len(pair) == len(PROJECTIONS)}
            resources = {config: cost_model.estimate(config, shape, GPU) for config in whole}
            found.append(Cell(layer, tokens, whole, resources))
    return found


def geomean(regrets: Sequence[float]) -> float:
    """Of ratios, so of 1 + regret."""
    return math.exp(math.fsum(math.log1p(regret) for regret in regrets) / len(regrets)) - 1


def markdown(trials: Sequence[Cell]) -> str:
    rows = [
        "| layer | M | best measured | us | ranked first | predicted us | regret | best of first 8 | default |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    first, shortlist, defaults = [], [], []
    for cell in trials:
        ranked, default = cell.ranked(), cell.default()
        first.append(cell.regret(ranked[:1]))
        shortlist.append(cell.regret(ranked[:SHORTLIST]))
        if default is not None:
            defaults.append(cell.regret([default]))
        rows.append(
            f"| {cell.layer} | {cell.tokens} | {cell.best} | {cell.measured_us(cell.best):.1f} | {ranked[0]} "
            f"| {cell.predicted_us(ranked[0]):.1f} | {first[-1]:.1%} | {shortlist[-1]:.1%} "
            f"| {'not measured' if default is None else f'{defaults[-1]:.1%}'} |"
        )
    for name, of in (("geometric mean", geomean), ("worst", max)):
        default_regret = f"{of(defaults):.1%} of {len(defaults)}" if defaults else ""
        rows.append(f"| **{name}** | | | | | | **{of(first):.1%}** | **{of(shortlist):.1%}** | {default_regret} |")
    return "\n".join(rows)


def _loss(trials: Sequence[Cell]) -> float:
    """Regret of a soft choice among the predicted fastest, and squared log errors, mostly of what is near the best."""
    total = 0.0
    for cell in trials:
        best_us = cell.measured_us(cell.best)
        slower = [cell.measured_us(config) / best_us for config in cell.pairs]
        predicted = [cell.predicted_us(config) for config in cell.pairs]
        choice = [(us / min(predicted)) ** (-1 / 0.03) for us in predicted]
        total += math.log(sum(map(float.__mul__, choice, slower)) / sum(choice))
        near = [ratio**-2 for ratio in slower]
        errors = [math.log(us / best_us / ratio) for us, ratio in zip(predicted, slower, strict=True)]
        mean = sum(map(float.__mul__, near, errors)) / sum(near)
        total += 1.5 * sum(w * (error - mean) ** 2 for w, error in zip(near, errors, strict=True)) / sum(near)
        total += 0.45 * mean**2
    return total / len(trials)


def _vary(spreads: Mapping[str, float], chance: random.Random) -> None:
    """Multiply each of those constants by a random factor near 1."""
    constants = {
        name: getattr(gpu_family.NVIDIA, name) * math.exp(chance.gauss(0, spread)) for name, spread in spreads.items()
    }
    gpu_family.NVIDIA = replace(gpu_family.NVIDIA, **constants)


def _fit(trials: Sequence[Cell], chance: random.Random) -> None:
    """Set the model's constants to what a random descent finds best for these trials."""
    best = _loss(trials)
    steps = dict.fromkeys(FITTED, 0.2)
    for _ in range(_ROUNDS):
        before = gpu_family.NVIDIA
        names = chance.sample(FITTED, chance.randint(1, 3))
        _vary({name: steps[name] for name in names}, chance)
        loss = _loss(trials)
        grow = 1.3 if loss < best else 0.95
        steps |= {name: min(0.5, max(0.02, steps[name] * grow)) for name in names}
        if loss < best:
            best = loss
        else:
            gpu_family.NVIDIA = before


def leave_one_out(trials: Sequence[Cell]) -> str:
    rows = [
        f"| fitted without | regret there, mean | worst | best of first 8, mean | worst | {' | '.join(FITTED)} |",
        "|---" * (5 + len(FITTED)) + "|",
    ]
    shipped = gpu_family.NVIDIA
    for layer in LAYERS:
        chance = random.Random(0)
        gpu_family.NVIDIA = shipped
        _vary(dict.fromkeys(FITTED, 0.5), chance)
        _fit([cell for cell in trials if cell.layer != layer], chance)
        ranked = [(cell, cell.ranked()) for cell in trials if cell.layer == layer]
        regrets = [[cell.regret(configs[:size]) for cell, configs in ranked] for size in (1, SHORTLIST)]
        found = [f"{of(regret):.1%}" for regret in regrets for of in (geomean, max)]
        found += [f"{getattr(gpu_family.NVIDIA, name):.3g}" for name in FITTED]
        rows.append(f"| {layer} | {' | '.join(found)} |")
    gpu_family.NVIDIA = shipped
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=Path, default=TRIALS)
    parser.add_argument("--leave-one-out", action="store_true")
    arguments = parser.parse_args()
    trials = cells(arguments.trials)
    print(leave_one_out(trials) if arguments.leave_one_out else markdown(trials))


if __name__ == "__main__":
    main()
