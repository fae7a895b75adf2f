"""Our path behind the up GEMM against the engine's tuned layer: whole layers in turn, and where the time of each goes.

usage, from the repository root: python -m benchmarks.down_path [--layers NAME ...] [--batch-size M ...] [--rounds 32]

The engine runs what a server beside which this package is installed takes: the shipped tables, or its own. Ours runs
the fastest of our tiles, behind the engine's up GEMM or ours. Cold L2 before each launch, uniform and Zipf routing in
turn, whole layers: sort, quantisation, up, activation, down, sum.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Any

from benchmarks.vs_upstream.report import here
from sglang_moe_ext.core import EngineError, MoEExtError, MoEShape, Quantisation, TileConfig
from sglang_moe_ext.engines.sglang import kernel, lookup, sorted_layer, whole_layer
from sglang_moe_ext.engines.sglang.sorted_layer import Down, Up
from sglang_moe_ext.kernels.short_down import LONGEST_K, ShortDownConfig
from sglang_moe_ext.kernels.sorted_down import DownConfig
from sglang_moe_ext.kernels.sorted_up import UpConfig
from sglang_moe_ext.roofline import pair_floor_us
from sglang_moe_ext.tuning import pickup, routing, statistics
from sglang_moe_ext.tuning.layer import ROUTINGS, Batch, Layer
from sglang_moe_ext.tuning.timing import Stopwatch, cuda_queue

_BLOCK = Quantisation("fp8_w8a8", (128, 128))
LAYERS = {
    "GLM-4.7-Flash bf16": MoEShape(65, 1536, 2048, 5, fused_shared=1),
    "Qwen3-30B-A3B bf16": MoEShape(128, 768, 2048, 8),
    "Qwen3-30B-A3B fp8 block": MoEShape(128, 768, 2048, 8, _BLOCK),
    "DeepSeek-V3 TP8 fp8 block": MoEShape(257, 256, 7168, 9, _BLOCK, fused_shared=1),
}
TOKENS = (64, 256, 512, 1024, 2048, 4096, 8192, 16384)
_SEED = 2000
_SCREENED_TURNS, _STAGE_TURNS = 8, 12

# block_m, block_n, block_k, warps, stages, programs an SM (0: not persistent), half stores
_TILES_16_BITS = (
    (128, 256, 64, 8, 3, 1, False),
    (128, 256, 64, 8, 3, 1, True),
    (128, 256, 64, 8, 4, 1, True),
    (128, 256, 64, 8, 3, 0, True),
    (128, 128, 64, 8, 4, 1, False),
    (128, 128, 64, 4, 3, 2, False),
    (128, 128, 64, 8, 3, 2, False),
    (64, 256, 64, 4, 3, 1, False),
    (64, 256, 64, 8, 4, 1, True),
    (64, 128, 64, 4, 4, 2, False),
    (64, 128, 64, 4, 4, 0, False),
    (64, 128, 128, 4, 3, 2, False),
    (64, 64, 128, 4, 4, 3, False),
)
_TILES_BLOCK_FP8 = (
    (64, 128, 128, 4, 3, 3, False),
    (64, 128, 128, 4, 3, 0, False),
    (64, 128, 128, 4, 4, 2, False),
    (64, 128, 128, 8, 3, 2, False),
    (128, 128, 128, 8, 3, 2, False),
    (128, 128, 128, 8, 4, 1, False),
    (128, 128, 128, 8, 3, 0, False),
    (128, 64, 128, 4, 4, 2, False),
    (64, 64, 128, 4, 4, 4, False),
    (128, 256, 128, 8, 3, 1, True),
)


# block_m, block_n, block_k, tiles a program, warps, stages: for short K, A kept
_SHORT_BLOCK_FP8 = (
    (64, 64, 128, 28, 4, 3),
    (64, 64, 128, 112, 4, 3),
    (64, 64, 128, 14, 4, 3),
    (128, 64, 128, 28, 8, 3),
    (128, 64, 128, 112, 8, 3),
    (128, 128, 128, 14, 8, 3),
    (128, 128, 128, 56, 8, 3),
)


def tiles(shape: MoEShape, align_block_m: int) -> list[Down]:
    """Those whose rows lie within one block of the sort."""
    short: list[Down] = []
    if shape.quantisation.is_block_wise and shape.intermediate_size <= LONGEST_K:
        short = [ShortDownConfig(*numbers) for numbers in _SHORT_BLOCK_FP8 if align_block_m % numbers[0] == 0]
    table = _TILES_BLOCK_FP8 if shape.quantisation.is_block_wise else _TILES_16_BITS
    return short + [
        DownConfig(m, n, k, group, warps, stages, persistent=crew > 0, programs_per_sm=max(crew, 1), half_stores=half)
        for (m, n, k, warps, stages, crew, half), group in itertools.product(table, (1, 8))
        if align_block_m % m == 0
    ]


# As above: gate and up as they lie, and an activation behind them.
_PLAIN_UPS_16_BITS = (
    (128, 256, 64, 8, 3, 1, True),
    (128, 256, 64, 8, 4, 1, True),
    (128, 256, 64, 8, 3, 0, True),
    (128, 128, 64, 8, 4, 1, False),
    (64, 256, 64, 8, 4, 1, True),
    (64, 128, 64, 4, 4, 2, False),
    (64, 128, 64, 4, 3, 0, False),
)
_PLAIN_UPS_BLOCK_FP8 = (
    (64, 128, 128, 4, 3, 0, False),
    (64, 128, 128, 4, 4, 2, False),
    (64, 128, 128, 4, 2, 3, False),
    (128, 128, 128, 8, 3, 1, False),
)
# The same without halves: the activation in the same kernel.
_UPS_16_BITS = (
    (128, 128, 64, 8, 3, 1),
    (128, 128, 64, 8, 3, 0),
    (128, 64, 64, 8, 4, 1),
    (128, 64, 64, 8, 3, 2),
    (64, 128, 64, 4, 3, 1),
    (64, 128, 64, 8, 4, 1),
    (64, 64, 64, 4, 4, 2),
    (64, 64, 64, 4, 4, 0),
)
_UPS_BLOCK_FP8 = (
    (64, 128, 128, 8, 3, 1),
    (64, 128, 128, 8, 3, 0),
    (64, 128, 128, 8, 2, 2),
    (64, 128, 128, 8, 2, 0),
    (64, 64, 128, 4, 3, 2),
    (64, 64, 128, 4, 3, 0),
    (128, 64, 128, 8, 3, 1),
    (128, 64, 128, 8, 2, 2),
)


def ups(shape: MoEShape, taken: TileConfig, tokens: int) -> list[Up]:
    """The up GEMM as the engine runs it, and with blocks that our down GEMM likes; and ours."""
    plain = replace(taken, use_tma=False)
    wider = [replace(plain, block_m=m) for m in (64, 128) if m > plain.block_m and tokens >= 1024]
    table = _UPS_BLOCK_FP8 if shape.quantisation.is_block_wise else _UPS_16_BITS
    fused = [
        UpConfig(m, n, k, group, warps, stages, persistent=crew > 0, programs_per_sm=max(crew, 1))
        for (m, n, k, warps, stages, crew), group in itertools.product(table, (1, 8, 32))
    ]
    table_of_plain = _PLAIN_UPS_BLOCK_FP8 if shape.quantisation.is_block_wise else _PLAIN_UPS_16_BITS
    ours = [
        UpConfig(m, n, k, group, warps, stages, crew > 0, max(crew, 1), is_fused=False, half_stores=half)
        for (m, n, k, warps, stages, crew, half), group in itertools.product(table_of_plain, (1, 8, 32))
    ]
    return [plain, *wider, *fused, *ours]


class Racer:
    """One layer on this GPU."""

    def __init__(self, shape: MoEShape) -> None:
        self.shape = shape
        self._layer = Layer(kernel.load(), shape, routing.SOURCES["mixed"], _SEED)
        queue = cuda_queue()
        self._screens, self._layers, self._stages = Stopwatch(queue), Stopwatch(queue), Stopwatch(queue)

    def _ours(self, batch: Batch, up: Up, down: Down) -> Callable[[int], Any]:
        return lambda turn: sorted_layer.run(self._layer.engine, self.shape, self._layer.whole(batch, turn), up, down)

    def _engines(self, batch: Batch, up: TileConfig, down: TileConfig) -> Callable[[int], Any]:
        return lambda turn: whole_layer.run(self._layer.engine, self.shape, self._layer.whole(batch, turn), up, down)

    def screened(self, batch: Batch, taken: TileConfig) -> dict[tuple[Up, Down], float]:
        """Microseconds of whole layers of ours: of each BLOCK_SIZE_M each up, then each down with the best of them.

        Raises:
            EngineError: none runs.
        """
        timed: dict[tuple[Up, Down], float] = {}
        candidates = ups(self.shape, taken, batch.tokens)
        for block_m in sorted({up.block_m for up in candidates}):
            downs = tiles(self.shape, block_m)
            of_up = [(up, downs[0]) for up in candidates if up.block_m == block_m and downs]
            timed |= (first := self._timed(batch, of_up))
            if first:
                best, _ = min(first, key=lambda pair: first[pair])
                timed |= self._timed(batch, [(best, down) for down in downs[1:]])
        if not timed:
            raise EngineError(f"none of our tiles runs for M={batch.tokens}")
        return timed

    def _timed(self, batch: Batch, pairs: Sequence[tuple[Up, Down]]) -> dict[tuple[Up, Down], float]:
        """Median microseconds of the layer. What cannot run is left out, with a line."""
        timed: dict[tuple[Up, Down], float] = {}
        for up, down in pairs:
            launch = self._ours(batch, up, down)
            try:
                launch(0)
                timed[up, down] = median(row[0] for row in self._screens.rounds([launch], range(_SCREENED_TURNS)))
            except Exception as error:  # noqa: BLE001 - the compiler fails in many ways; each costs this tile alone
                print(
                    f"  left out: {_said(up)} / {_said(down)}: {type(error).__name__}: {str(error)[:150]}",
                    file=sys.stderr,
                )
        return timed

    def raced(self, tokens: int, up: TileConfig, down: TileConfig, rounds: int) -> dict[str, Any]:
        """The engine's pair against the best of ours, in turn."""
        batch = self._layer.batch(tokens, _SEED)
        screened = self.screened(batch, up)
        our_up, our_down = min(screened, key=lambda pair: screened[pair])
        launches = [self._engines(batch, up, down), self._ours(batch, our_up, our_down)]
        errors = [self._layer.error(batch, 0, launch(0)) for launch in launches]
        rows = self._layers.rounds(launches, range(rounds))
        engines, ours = ([row[at] for row in rows] for at in (0, 1))
        gain = statistics.gain(engines, ours, ROUTINGS)
        return {
            "M": tokens,
            "engine": f"{up} / {down}",
            "ours": f"{_said(our_up)} / {_said(our_down)}",
            "engine_us": statistics.typical_us(engines, ROUTINGS),
            "ours_us": statistics.typical_us(ours, ROUTINGS),
            "gain": gain.value,
            "gain_95": [gain.low, gain.high],
            "errors": errors,
            "config": asdict(our_down),
            "screened_us": [[_said(up), _said(down), us] for (up, down), us in screened.items()],
            "stages_us": self._by_stage(batch, our_up, our_down),
        }

    def _by_stage(self, batch: Batch, up: Up, down: Down) -> dict[str, float]:
        """Median microseconds of each stage of ours alone, on what the stages before it left."""
        to = sorted_layer.buffers(self.shape, batch.hidden, up)
        tensors = self._layer.whole(batch, 0)
        stages = sorted_layer.Stages(self._layer.engine, self.shape, tensors, up, down, to).all()
        for launch in stages.values():
            launch()
        alone = [lambda _, launch=launch: launch() for launch in stages.values()]
        rows = self._stages.rounds(alone, range(_STAGE_TURNS))
        return {name: median(row[at] for row in rows) for at, name in enumerate(stages)}


def _said(config: Up | Down) -> str:
    if isinstance(config, TileConfig):
        return f"engine's {config}"
    if isinstance(config, ShortDownConfig):
        tile = f"{config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps} s{config.num_stages}"
        return f"{tile} A kept for {config.tiles_per_program} tiles"
    crew = f"persistent x{config.programs_per_sm}" if config.persistent else "one tile each"
    tile = (
        f"{config.block_m}x{config.block_n}x{config.block_k} G{config.group_m} w{config.num_warps} s{config.num_stages}"
    )
    is_fused = isinstance(config, UpConfig) and config.is_fused
    return f"{tile} {crew}{' half stores' if config.half_stores else ''}{' fused' if is_fused else ''}"


_HEADER = """\
| M | engine us | ours us | engine / ours | 95 % | of floor | error, engine and ours | stages, us | engine | ours |
|---:|---:|---:|---:|---|---:|---|---|---|---|"""


def _row(row: dict[str, Any], floor_us: float) -> str:
    low, high = row["gain_95"]
    cells = (
        str(row["M"]),
        f"{row['engine_us']:.1f}",
        f"{row['ours_us']:.1f}",
        f"{row['gain']:.3f}x",
        f"{low:.3f} to {high:.3f}",
        f"{floor_us / row['ours_us']:.0%}",
        " and ".join(f"{error:.2e}" for error in row["errors"]),
        ", ".join(f"{name} {us:.0f}" for name, us in row["stages_us"].items()),
        row["engine"],
        row["ours"],
    )
    return f"| {' | '.join(cells)} |"


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
        taken = pickup.pairs_of(lookup.ask(lookup.Question(shape, arguments.batch_size), who=lookup.AS_SERVED))
        print(f"\n## {name}\n\n{_HEADER}", flush=True)
        racer = Racer(shape)
        document[name] = []
        for tokens in arguments.batch_size:
            try:
                row = racer.raced(tokens, taken[tokens]["up"], taken[tokens]["down"], arguments.rounds)
            except Exception as error:  # noqa: BLE001 - of one batch size; the others are still to be raced
                print(f"| {tokens} | {type(error).__name__}: {str(error)[:200]} |", flush=True)
                traceback.print_exc()
                continue
            document[name].append(row)
            print(_row(row, pair_floor_us(shape, place.gpu, tokens)), flush=True)
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
