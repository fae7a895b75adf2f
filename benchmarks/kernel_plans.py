"""Our path against the engine's layer, as shipped and tuned: whole layers in turn, and where the time of ours goes.

usage, from the repository root: python -m benchmarks.down_path [--layers NAME ...] [--batch-size M ...] [--rounds 32]

As shipped: the engine's own lookup, without us. Tuned: what a server beside which this package is installed takes.
Ours: the fastest of the paths that the tuner tries. Cold L2 before each launch, uniform and Zipf routing in turn, whole
layers: sort, quantization, up, activation, down, sum.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any, TypeVar

from benchmarks.vs_upstream.report import here
from sglang_moe_ext.core import EngineError, Failure, MoEExtError, MoEShape, Quantization
from sglang_moe_ext.engines.sglang import lookup_probe, sorted_layer
from sglang_moe_ext.gpu.roofline import pair_floor_us
from sglang_moe_ext.sorted_kernels import KernelPlan
from sglang_moe_ext.tables import kernel_table
from sglang_moe_ext.tuning import verify_install
from sglang_moe_ext.tuning.bench import routing
from sglang_moe_ext.tuning.bench.gpu_bench import BenchSetup, GpuBench
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchLayers,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
    LayerTimes,
    Pair,
    Runner,
    describe,
)
from sglang_moe_ext.tuning.bench.timer import Stopwatch, cuda_queue
from sglang_moe_ext.tuning.search import sorted_kernels, statistics

_BLOCK = Quantization("fp8_w8a8", (128, 128))
LAYERS = {
    "GLM-4.7-Flash bf16": MoEShape(65, 1536, 2048, 5, fused_shared=1),
    "Qwen3-30B-A3B bf16": MoEShape(128, 768, 2048, 8),
    "Qwen3-30B-A3B fp8 block": MoEShape(128, 768, 2048, 8, _BLOCK),
    "Qwen3-30B-A3B fp8 channel": MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", per_channel=True)),
    "DeepSeek-V3 TP8 fp8 block": MoEShape(257, 256, 7168, 9, _BLOCK, fused_shared=1),
}
TOKENS = (1, 64, 256, 512, 1024, 2048, 4096, 8192, 16384)
MANY_TOKENS = 1024
"""From here on ours is to win."""
_SEED, _STAGE_TURNS = 2000, 12
_A = TypeVar("_A", LayerTimes, Accuracy)


@dataclass(frozen=True, slots=True)
class Row:
    """One M. Times in microseconds; `errors` of tuned and ours against float32."""

    tokens: int
    tuned: Pair
    path: KernelPlan
    shipped_us: float
    tuned_us: float
    ours_us: float
    gain: statistics.Interval
    errors: tuple[float, float]
    stages_us: dict[str, float]
    floor_us: float


class Racer:
    """One layer on this GPU."""

    def __init__(self, shape: MoEShape, cache: Path) -> None:
        self.shape = shape
        self._bench: GpuBench = BenchSetup(shape, routing.SOURCES["mixed"], _SEED, cache, "sglang")()
        self._stages = Stopwatch(cuda_queue())

    def _ask(self, question: BenchRequest) -> BenchResult:
        try:
            return self._bench.measure(question)
        except Exception as error:  # noqa: BLE001 - the compiler fails in many ways; each costs this path alone
            print(f"  left out: {type(error).__name__}: {str(error)[:150]}", file=sys.stderr)
            return Failure(type(error).__name__, str(error))

    def _answered(self, question: BenchRequest, kind: type[_A]) -> _A:
        answer = self._ask(question)
        if not isinstance(answer, kind):
            raise EngineError(f"{question}: {answer}")
        return answer

    def raced(self, tokens: int, shipped: Pair, tuned: Pair, rounds: int, floor_us: float) -> Row:
        """All three in turn.

        Raises:
            EngineError: none of our paths runs, or the engine's own layer does not.
        """
        times, _ = sorted_kernels.screen_plans(self.shape, tokens, [tuned["up"]], self._ask, lambda _: None)
        if not times:
            raise EngineError(f"none of our paths runs for M={tokens}")
        path = min(times, key=times.__getitem__)
        runners: tuple[Runner, ...] = (shipped, tuned, path)
        raced = self._answered(BenchLayers(tokens, runners, rounds), LayerTimes)
        shipped_us, tuned_us, ours_us = (statistics.typical_us(us, raced.routings) for us in raced.us)
        wrong = [self._answered(CheckAccuracy(tokens, runner), Accuracy).error for runner in (tuned, path)]
        return Row(
            tokens,
            tuned,
            path,
            shipped_us,
            tuned_us,
            ours_us,
            gain=statistics.gain(raced.us[1], raced.us[2], raced.routings),
            errors=(wrong[0], wrong[1]),
            stages_us=self._by_stage(tokens, path),
            floor_us=floor_us,
        )

    def _by_stage(self, tokens: int, path: KernelPlan) -> dict[str, float]:
        """Median microseconds of each stage of ours alone, on what the stages before it left."""
        import torch

        layer_of = self._bench.layer
        batch = layer_of.batch(tokens, _SEED)
        tensors = layer_of.whole(batch, 0)

        def aligned() -> sorted_layer.SortedLayer:
            return sorted_layer.sort_tokens(layer_of.engine, self.shape, tensors, path)

        layer = aligned()
        hidden = sorted_layer.read(layer)
        gate_up = sorted_layer.run_up(layer, hidden)
        inner = sorted_layer.run_activation(layer, gate_up)
        down_rows, out = sorted_layer.run_down(layer, inner), torch.empty_like(batch.hidden)
        stages: dict[str, Callable[[], object]] = {
            "align": aligned,
            **({} if hidden.scale is None else {"quantize": lambda: sorted_layer.read(layer)}),
            "up": lambda: sorted_layer.run_up(layer, hidden),
            **({} if inner is gate_up else {"activation": lambda: sorted_layer.run_activation(layer, gate_up)}),
            "down": lambda: sorted_layer.run_down(layer, inner),
            "sum": lambda: sorted_layer.write_sum(layer, down_rows, out),
        }
        alone = [lambda _, launch=launch: launch() for launch in stages.values()]
        rows = self._stages.rounds(alone, range(_STAGE_TURNS))
        return {name: median(row[at] for row in rows) for at, name in enumerate(stages)}


_HEADER = """\
| M | as shipped us | tuned us | ours us | tuned / ours | 95 % | shipped / ours | of floor | error, tuned and ours \
| stages of ours, us | tuned | ours |
|---:|---:|---:|---:|---:|---|---:|---:|---|---|---|---|"""


def _cells(row: Row) -> str:
    cells = (
        str(row.tokens),
        f"{row.shipped_us:.1f}",
        f"{row.tuned_us:.1f}",
        f"{row.ours_us:.1f}",
        f"{row.gain.value:.3f}x",
        f"{row.gain.low:.3f} to {row.gain.high:.3f}",
        f"{row.shipped_us / row.ours_us:.2f}x",
        f"{row.floor_us / row.ours_us:.0%}",
        " and ".join(f"{error:.2e}" for error in row.errors),
        ", ".join(f"{name} {us:.0f}" for name, us in row.stages_us.items()),
        describe(row.tuned),
        str(row.path).removeprefix("KERNEL "),
    )
    return f"| {' | '.join(cells)} |"


def _document(row: Row) -> dict[str, Any]:
    return {
        "m": row.tokens,
        "us": [row.shipped_us, row.tuned_us, row.ours_us],
        "gain": [row.gain.value, row.gain.low, row.gain.high],
        "errors": row.errors,
        "stages_us": row.stages_us,
        "path": kernel_table.document_of(row.path),
    }


def _means(rows: Sequence[Row]) -> str:
    """Geometric means over the many tokens: of ours, and of a server that runs ours only where it is the faster."""
    many = [row for row in rows if row.tokens >= MANY_TOKENS]
    if not many:
        return "no M is large enough for a mean"
    ours = geometric_mean(row.gain.value for row in many)
    served = geometric_mean(max(1.0, row.gain.value) for row in many)
    shipped = geometric_mean(row.shipped_us / min(row.ours_us, row.tuned_us) for row in many)
    return (
        f"geometric means for M >= {MANY_TOKENS}: ours {ours:.3f}x of the tuned engine, the faster of both "
        f"{served:.3f}x, which is {shipped:.3f}x of the engine as shipped"
    )


def run(arguments: argparse.Namespace, command: str) -> None:
    """Race the layers; the last line printed is JSON.

    Raises:
        MoEExtError: there is no GPU or no engine.
    """
    place = here(command)
    engine = place.engine
    print(f"{place.gpu.device_name}, SGLang {engine.version_text}, Triton {engine.triton}, {place.date}: `{command}`")
    document: dict[str, Any] = {}
    for name in arguments.layers:
        shape = LAYERS[name]
        question = lookup_probe.LookupRequest(shape, arguments.batch_size)
        shipped, tuned = (
            verify_install.pairs_of(lookup_probe.ask(question, who=who))
            for who in (lookup_probe.ALONE, lookup_probe.AS_SERVED)
        )
        print(f"\n## {name}\n\n{_HEADER}", flush=True)
        with tempfile.TemporaryDirectory() as cache:
            racer, rows = Racer(shape, Path(cache)), []
            for m in arguments.batch_size:
                try:
                    floor_us = pair_floor_us(shape, place.gpu, m)
                    rows.append(racer.raced(m, shipped[m], tuned[m], arguments.rounds, floor_us))
                except Exception as error:  # noqa: BLE001 - of one batch size; the others are still to be raced
                    print(f"| {m} | {type(error).__name__}: {str(error)[:200]} |", flush=True)
                    traceback.print_exc()
                    continue
                print(_cells(rows[-1]), flush=True)
        print(f"\n{_means(rows)}", flush=True)
        document[name] = [_document(row) for row in rows]
    print(f"\n{json.dumps(document)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 an error in one line, 2 usage."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), metavar="NAME")
    parser.add_argument("--batch-size", nargs="+", type=int, default=list(TOKENS), metavar="M")
    parser.add_argument("--rounds", type=int, default=32)
    try:
        run(parser.parse_args(given), shlex.join(["python", "-m", "benchmarks.down_path", *given]))
    except MoEExtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
