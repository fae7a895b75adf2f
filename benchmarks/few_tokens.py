"""The two launches for few tokens against SGLang's layer: whole layers in CUDA graphs, in turn, with a cold L2.

usage, from the repository root: python -m benchmarks.few_tokens [--layers NAME ...] [--tokens M ...] [--rounds 32]
    [--out FILE] [--lock FILE]

Ours: the fastest of the tiles in `few_tokens_space`. Tuned engine: the fastest pair of a scan of the engine's tiles,
those of our H200 tables among them. Routing: uniform and Zipf in turn.
Errors are relative, against float32 with the stored weights, with activations as they are and quantized as the scheme
says. "Bits": a graph that is replayed on other data gives what the eager launches give.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from sglang_moe_ext.core import MoEExtError, MoEShape, Quantization, Target, TileConfig
from sglang_moe_ext.few_tokens_config import DownTile, FewTokensConfig, FewTokensProblem, UpTile, refusals

_BLOCK = Quantization("fp8_w8a8", (128, 128))
LAYERS = {
    "GLM-4.7-Flash bf16": MoEShape(65, 1536, 2048, 5, fused_shared=1),
    "Qwen3-30B-A3B bf16": MoEShape(128, 768, 2048, 8),
    "Qwen3-30B-A3B fp8 block": MoEShape(128, 768, 2048, 8, _BLOCK),
    "DeepSeek-V3 TP8 fp8 block": MoEShape(257, 256, 7168, 9, _BLOCK, fused_shared=1),
    "Qwen3-30B-A3B fp8 channel": MoEShape(128, 768, 2048, 8, Quantization("fp8_w8a8", per_channel=True)),
}
TOKENS = (1, 2, 4, 8, 16, 32)
_SETS, _SCREEN_ROUNDS, _SEED = 4, 5, 3000
_ENGINE_UP = (
    (32, 64, 5),
    (32, 128, 4),
    (64, 64, 5),
    (64, 128, 2),
    (64, 128, 4),
    (64, 128, 5),
)
_ENGINE_DOWN = ((64, 128, 3), (64, 128, 2), (64, 128, 4), (32, 128, 3), (128, 128, 2), (128, 64, 3))
"""BLOCK_SIZE_N, BLOCK_SIZE_K and num_stages, of 16 rows and 4 warps."""


Tiles = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Data:
    """One batch: hidden, ids, router's weights."""

    hidden: Any
    ids: Any
    weights: Any


def few_tokens_space(shape: MoEShape, tokens: int) -> Iterator[FewTokensConfig]:
    """Tiles to try: a base of each family, then other ups beside its down, then other downs beside its up."""
    is_byte = shape.quantization.weight_bits <= 8
    vector_up = [
        UpTile(1, *tile) for tile in ((16, 256, 4, 3), (8, 512, 4, 3), (4, 512, 4, 3), (8, 256, 2, 6), (16, 256, 4, 5))
    ]
    vector_down = [
        DownTile(1, *tile)
        for tile in ((16, 256, 4, 4), (8, 512, 4, 3), (16, 512, 4, 3, 2), (16, 512, 4, 4), (8, 256, 4, 4))
    ]
    if is_byte:
        matrix_up: Tiles = (
            (32, 128, 4, 4), (16, 128, 2, 5), (8, 128, 1, 6), (64, 128, 4, 4), (32, 128, 4, 6), (64, 128, 8, 4),
            (16, 128, 4, 4), (32, 128, 2, 4), (64, 128, 4, 3),
        )  # fmt: skip
        matrix_down: Tiles = (
            (64, 128, 4, 4, 4), (64, 128, 4, 4, 8), (64, 128, 4, 4, 2), (32, 128, 4, 4, 4), (32, 128, 2, 4, 8),
            (128, 128, 4, 4, 8), (64, 128, 4, 4, 12), (128, 128, 8, 4, 16), (32, 128, 4, 4, 12),
        )  # fmt: skip
    else:
        matrix_up = (
            (32, 128, 4, 3), (32, 64, 4, 6), (32, 128, 4, 5), (32, 128, 4, 4), (16, 128, 4, 4), (64, 64, 4, 4),
        )  # fmt: skip
        matrix_down = (
            (64, 128, 4, 4, 4), (64, 128, 4, 4, 8), (64, 64, 4, 6, 4), (64, 256, 4, 3, 8), (64, 128, 4, 4, 2),
            (64, 128, 4, 3, 12),
        )  # fmt: skip
    problem = problem_of(shape, tokens)
    for ups, downs, grouped in _families(tokens, is_byte, (vector_up, vector_down), (matrix_up, matrix_down)):
        for up in ups:
            if not refusals(config := FewTokensConfig(up, downs[0], grouped), problem):
                yield config
        for down in downs[1:]:
            if not refusals(config := FewTokensConfig(ups[0], down, grouped), problem):
                yield config


def _families(
    tokens: int, is_byte: bool, vector: tuple[list[UpTile], list[DownTile]], matrix: tuple[Tiles, Tiles]
) -> list[tuple[list[UpTile], list[DownTile], bool]]:
    vector_up, vector_down = vector
    matrix_up, matrix_down = matrix
    families: list[tuple[list[UpTile], list[DownTile], bool]] = []
    if tokens <= 8:
        if not is_byte:
            families.append((vector_up, vector_down, False))
        for rows in (8, 16):
            downs = [DownTile(rows, *tile) for tile in matrix_down]
            families.append(([UpTile(rows, *tile) for tile in matrix_up], downs, False))
    if tokens > 1:
        # Eight rows are no operand of wgmma in Triton.
        for rows in [rows for rows in (8, 16, 32) if rows >= tokens][: 2 if is_byte and tokens <= 8 else 1]:
            if rows > 8 or is_byte:
                downs = [DownTile(rows, *tile) for tile in matrix_down]
                families.append(([UpTile(rows, *tile) for tile in matrix_up], downs, True))
        if tokens <= 8 and not is_byte:
            downs = [DownTile(16, *tile) for tile in matrix_down]
            families.append(([UpTile(16, *tile) for tile in matrix_up], downs, True))
    return families


def problem_of(shape: MoEShape, tokens: int) -> FewTokensProblem:
    """What the rules look at."""
    return FewTokensProblem(tokens, shape.top_k, shape.intermediate_size, shape.hidden_size, shape.quantization)


def compiled_ahead(shape: MoEShape, tokens: Sequence[int], sm: int) -> int:
    """Fill Triton's cache from all cores, before this process touches the GPU; how many binaries."""
    jobs: dict[tuple[Any, ...], tuple[int, FewTokensConfig, str]] = {}
    for m in tokens:
        for config in few_tokens_space(shape, m):
            other_split = replace(config.down, split=1 if config.down.split > 1 else 2, prefetched=0)
            by_expert = config.grouped and shape.experts <= m * shape.top_k
            jobs.setdefault(("up", config.up, config.grouped, by_expert, config.down.split > 1), (m, config, "up"))
            split = other_split.split > 1
            jobs.setdefault(
                ("up", config.up, config.grouped, by_expert, split), (m, replace(config, down=other_split), "up")
            )
            for prefetched in (0, 1, 2):
                down = replace(config.down, prefetched=prefetched)
                if not refusals(other := replace(config, down=down), problem_of(shape, m)):
                    jobs.setdefault(("down", down, config.grouped), (m, other, "down"))
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for failure in pool.imap_unordered(partial(_compile, shape, sm), jobs.values(), chunksize=4):
            if failure:
                print(f"  not compiled: {failure}", flush=True)
    return len(jobs)


def engines_ahead(shape: MoEShape, tokens: Sequence[int]) -> int:
    """The same for the engine's tiles."""
    from sglang_moe_ext.engines.registry import SGLANG
    from sglang_moe_ext.engines.sglang import installation
    from sglang_moe_ext.gpu import specs
    from sglang_moe_ext.tuning.bench.messages import Pair
    from sglang_moe_ext.tuning.compile.cache import CompileCache
    from sglang_moe_ext.tuning.compile.kernel_source import kernel_source
    from sglang_moe_ext.tuning.compile.pool import compile_all
    from sglang_moe_ext.tuning.problem import Problem
    from sglang_moe_ext.tuning.search import candidates

    ups, downs = engine_tiles(shape)
    pairs: list[Pair] = [{"up": ups[0], "down": down} for down in downs]
    pairs += [{"up": up, "down": down} for up in ups for down in (downs[0], replace(downs[0], use_tma=True))]
    gpu = specs.detect()
    assert gpu is not None  # the benchmark needs one
    problem = Problem(shape, gpu, "sglang")
    jobs = {job for m in tokens for pair in pairs for job in candidates.pair_jobs(pair, problem, m)}
    source = kernel_source(installation.find(), SGLANG)
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    compile_all(source, list(jobs), cache=CompileCache(None), workers=6, triton_cache=folder)
    return len(jobs)


def engine_tiles(shape: MoEShape) -> tuple[list[TileConfig], list[TileConfig]]:
    """The scan: ups and downs, with TMA where the engine's is right."""
    block = shape.quantization.block_shape
    is_whole = {k for k in (64, 128, 256) if block is None or block[1] % k == 0}
    ups = [TileConfig(16, n, k, 1, 4, stages) for n, k, stages in _ENGINE_UP if k in is_whole]
    downs = [TileConfig(16, n, k, 1, 4, stages) for n, k, stages in _ENGINE_DOWN if k in is_whole]
    if block is not None or shape.quantization.scheme is None:
        downs += [replace(tile, use_tma=True) for tile in downs]
    return ups, downs


def _compile(shape: MoEShape, sm: int, job: tuple[int, FewTokensConfig, str]) -> str | None:
    import torch
    import triton

    from sglang_moe_ext.kernels import few_tokens
    from sglang_moe_ext.kernels.compiled import TargetOnlyDriver
    from sglang_moe_ext.kernels.few_tokens_kernel import down_kernel, up_kernel

    m, config, which = job
    try:
        triton.runtime.driver.set_active(TargetOnlyDriver(Target(sm)))
        with torch.device("meta"):
            hidden = torch.empty(m, shape.hidden_size, dtype=getattr(torch, shape.dtype))
            w1, w2 = (_empty_weights(shape, projection) for projection in ("up", "down"))
            routed = few_tokens.Routed(
                torch.empty(m, shape.top_k, dtype=torch.int32), torch.empty(m, shape.top_k, dtype=torch.float32)
            )
            between = few_tokens.workspace(hidden, w1.values, routed.ids, config)
        if which == "up":
            up_kernel.warmup(**few_tokens.up_arguments(hidden, w1, routed, between, config, sm=sm), grid=(1,))
        else:
            arguments = few_tokens.down_arguments(between, w2, routed, torch.empty_like(hidden), config, sm=sm)
            down_kernel.warmup(**arguments, grid=(1,))
    except Exception as error:  # noqa: BLE001 - the compiler fails in many ways; each costs this tile alone
        return f"{which} {config}: {type(error).__name__}: {str(error)[-200:]}"
    return None


def _empty_weights(shape: MoEShape, projection: Any) -> Any:
    import torch

    from sglang_moe_ext.kernels.few_tokens import ExpertWeights

    columns, k = shape.gemm(projection)
    quantization = shape.quantization
    if quantization.scheme is None:
        return ExpertWeights(torch.empty(shape.experts, columns, k, dtype=getattr(torch, shape.dtype)))
    n, d = quantization.block_shape or (1, k)
    scale = torch.empty(shape.experts, columns // n, k // d, dtype=torch.float32)
    return ExpertWeights(torch.empty(shape.experts, columns, k, dtype=torch.float8_e4m3fn), scale, quantization)


class Racer:
    """One layer on this GPU: its weights, some batches, and graphs of whoever runs it."""

    def __init__(self, shape: MoEShape) -> None:
        import torch

        from sglang_moe_ext.engines.registry import SGLANG
        from sglang_moe_ext.engines.sglang import runner
        from sglang_moe_ext.kernels.few_tokens import ExpertWeights
        from sglang_moe_ext.tuning.bench import routing
        from sglang_moe_ext.tuning.bench.layer import BenchedLayer
        from sglang_moe_ext.tuning.bench.timer import Stopwatch, cuda_queue

        self.shape, self.engine = shape, runner.load()
        self.layer = BenchedLayer(self.engine, shape, routing.SOURCES["mixed"], _SEED, adapter=SGLANG)
        self.w1, self.w2 = (
            ExpertWeights(weights.stored, weights.scale, shape.quantization)
            for weights in (self.layer.weights["up"], self.layer.weights["down"])
        )
        read = torch.ones(32 << 20, dtype=torch.float32, device="cuda")
        total = torch.empty((), dtype=torch.float32, device="cuda")
        self.flush: Callable[[], object] = lambda: torch.sum(read, dim=0, out=total)
        self.stopwatch = Stopwatch(replace(cuda_queue(), flush=lambda: None))

    def data(self, tokens: int) -> list[Data]:
        """So many batches with routings and inputs of their own."""
        sets = []
        for seed in range(_SETS):
            batch = self.layer.batch(tokens, _SEED + seed)
            chosen = batch.routings[seed]
            sets.append(Data(batch.hidden, chosen.topk_ids, chosen.topk_weights))
        return sets

    def engines(self, up: TileConfig, down: TileConfig, data: Data) -> Any:
        """[tokens, hidden] by the engine's layer."""
        from sglang_moe_ext.engines.sglang import runner
        from sglang_moe_ext.engines.tensors import LayerTensors

        tensors = LayerTensors(
            data.hidden, self.w1.values, self.w2.values, self.w1.scale, self.w2.scale, data.weights, data.ids
        )
        return runner.run(self.engine, self.shape, tensors, up, down)

    def ours(self, config: FewTokensConfig, data: Data) -> Any:
        """[tokens, hidden] by the two launches."""
        import torch

        from sglang_moe_ext.kernels.few_tokens import Routed, few_tokens_layer

        out = torch.empty_like(data.hidden)
        few_tokens_layer(data.hidden, self.w1, self.w2, Routed(data.ids, data.weights), out, config)
        return out

    def graph(self, run: Callable[[Data], Any] | None, sets: Sequence[Data]) -> Any:
        """Of all batches, a flush of the L2 before each, as a decode step's other kernels would be; None: flushes."""
        import torch

        if run is not None:
            run(sets[0])
        torch.cuda.synchronize()
        graph, results = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):
            for data in sets:
                self.flush()
                if run is not None:
                    results.append(run(data))
        return graph, results

    def timed(self, graphs: Sequence[Any], sets: Sequence[Data], rounds: int) -> list[list[float]]:
        """Microseconds that a layer adds to the graph, [graph][round]: less those of the flushes alone."""
        empty = self.graph(None, sets)
        launches = [lambda _, replay=graph[0].replay: replay() for graph in (empty, *graphs)]
        rows = self.stopwatch.rounds(launches, range(rounds))
        base = median(row[0] for row in rows)
        return [[(row[at + 1] - base) / len(sets) for row in rows] for at in range(len(graphs))]

    def screened(
        self, runs: dict[Any, Callable[[Data], Any]], sets: Sequence[Data], rounds: int = _SCREEN_ROUNDS
    ) -> dict[Any, float]:
        """Median microseconds of each that runs."""
        graphs: dict[Any, Any] = {}
        for name, run in runs.items():
            try:
                graphs[name] = self.graph(run, sets)
            except Exception as error:  # noqa: BLE001, PERF203 - each costs this candidate alone
                print(f"  left out: {name}: {type(error).__name__}: {str(error)[:150]}", flush=True)
        times = self.timed(list(graphs.values()), sets, rounds)
        return {name: median(us) for name, us in zip(graphs, times, strict=True)}

    def best_engine(self, tokens: int, sets: Sequence[Data]) -> tuple[tuple[TileConfig, TileConfig], dict[Any, float]]:
        """The engine's fastest pair of the scan."""
        ups, downs = engine_tiles(self.shape)
        by_up = self.screened({up: partial(self.engines, up, downs[0]) for up in ups}, sets)
        best_up = min(by_up, key=by_up.__getitem__)
        by_down = self.screened({down: partial(self.engines, best_up, down) for down in downs}, sets)
        best_down = min(by_down, key=by_down.__getitem__)
        screens = {f"up {up}": us for up, us in by_up.items()} | {f"down {down}": us for down, us in by_down.items()}
        return (best_up, best_down), screens

    def swept(self, tokens: int, sets: Sequence[Data]) -> tuple[list[FewTokensConfig], dict[str, float]]:
        """Our fastest of each family, and all that was screened."""
        screens = self.screened({c: partial(self.ours, c) for c in few_tokens_space(self.shape, tokens)}, sets)
        best: list[FewTokensConfig] = []
        seconds: dict[FewTokensConfig, float] = {}
        for family in sorted({(c.up.rows, c.grouped) for c in screens}):
            own = {c: us for c, us in screens.items() if (c.up.rows, c.grouped) == family}
            first = next(iter(own))
            ups = sorted((c for c in own if c.down == first.down), key=own.__getitem__)[:2]
            downs = sorted((c for c in own if c.up == first.up), key=own.__getitem__)[:2]
            pairs = [
                FewTokensConfig(up.up, replace(down.down, prefetched=prefetched), first.grouped)
                for up in ups
                for down in downs
                for prefetched in ((0, 1) if first.grouped else (0, 1, 2))
            ]
            pairs = [c for c in pairs if not refusals(c, problem_of(self.shape, tokens))]
            found = self.screened({c: partial(self.ours, c) for c in pairs}, sets, 2 * _SCREEN_ROUNDS)
            seconds |= found
            if found:
                best.append(min(found, key=found.__getitem__))
        if len(best) > 1:  # mixed: an up of one ungrouped family with the other's down
            loose = [c for c in best if not c.grouped]
            mixed = [FewTokensConfig(a.up, b.down) for a in loose for b in loose if a is not b]
            found = self.screened({c: partial(self.ours, c) for c in mixed}, sets, 2 * _SCREEN_ROUNDS) if mixed else {}
            seconds |= found
            best += sorted(found, key=found.__getitem__)[:1]
        return best, {str(c): round(us, 2) for c, us in (screens | seconds).items()}

    def errors(self, out: Any, data: Data) -> tuple[float, float]:
        """Against float32 with activations as they are, and as the scheme quantizes them."""
        from sglang_moe_ext.kernels import reference

        scheme = reference.moe_layer(
            data.hidden, self.w1.values, self.w2.values, data.weights, data.ids, quantization=self.shape.quantization,
            w1_scale=self.w1.scale, w2_scale=self.w2.scale,
        )  # fmt: skip
        return reference.relative_error(out, self._exact(data)), reference.relative_error(out, scheme)

    def _exact(self, data: Data) -> Any:
        import torch

        from sglang_moe_ext.kernels.quantize import Scales, real_weights

        scales = [None if w.scale is None else Scales(w.quantization, None, w.scale) for w in (self.w1, self.w2)]
        out = torch.zeros(data.hidden.shape, dtype=torch.float32, device="cuda")
        for token, ids in enumerate(data.ids.tolist()):
            for slot, expert in enumerate(ids):
                gate, up = (real_weights(self.w1.values, expert, scales[0]) @ data.hidden[token].float()).chunk(2)
                inner = torch.nn.functional.silu(gate) * up
                row = real_weights(self.w2.values, expert, scales[1]) @ inner
                out[token] += data.weights[token, slot] * row
        return out

    def by_launch(self, config: FewTokensConfig, sets: Sequence[Data]) -> tuple[float, float]:
        """Microseconds of `up` alone and of `down` alone, on what an up left."""
        from sglang_moe_ext.kernels import few_tokens

        routed = [few_tokens.Routed(data.ids, data.weights) for data in sets]
        between = [few_tokens.workspace(data.hidden, self.w1.values, data.ids, config) for data in sets]
        number = {id(data): at for at, data in enumerate(sets)}

        def up(data: Data) -> None:
            at = number[id(data)]
            few_tokens.few_tokens_up(data.hidden, self.w1, routed[at], between[at], config)

        def down(data: Data) -> Any:
            at, out = number[id(data)], data.hidden.clone()
            few_tokens.few_tokens_down(between[at], self.w2, routed[at], out, config)
            return out

        for data in sets:
            up(data)
        ups, downs = self.timed([self.graph(up, sets), self.graph(down, sets)], sets, 8)
        return median(ups), median(downs)

    def replay_gives_the_eager_bits(self, config: FewTokensConfig, sets: Sequence[Data]) -> bool:
        """One graph, replayed on every batch in turn; results are poisoned before."""
        import torch

        static = Data(*(tensor.clone() for tensor in (sets[0].hidden, sets[0].ids, sets[0].weights)))
        self.ours(config, static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self.ours(config, static)
        same = True
        for data in (*sets, sets[0]):
            static.hidden.copy_(data.hidden), static.ids.copy_(data.ids), static.weights.copy_(data.weights)
            result.fill_(float("nan"))
            graph.replay()
            same &= bool(torch.equal(result, self.ours(config, data)))
        return same


def measure(name: str, tokens: Sequence[int], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints a row for each M."""
    import torch

    from sglang_moe_ext.kernels import dependent_launch, few_tokens

    shape = LAYERS[name]
    began = time.monotonic()
    count = compiled_ahead(shape, tokens, arguments.sm)
    print(f"{name}: {count} binaries of ours after {time.monotonic() - began:.0f} s", flush=True)
    count = engines_ahead(shape, tokens)
    print(f"{name}: {count} of the engine after {time.monotonic() - began:.0f} s", flush=True)
    if arguments.lock:
        held = arguments.lock.open("w")
        fcntl.flock(held, fcntl.LOCK_EX)
    racer, rows = Racer(shape), []
    print(f"{name}: ready after {time.monotonic() - began:.0f} s", flush=True)
    print(_HEADER, flush=True)
    for m in tokens:
        sets = racer.data(m)
        pair, engine_screens = racer.best_engine(m, sets)
        best, screens = racer.swept(m, sets)
        runs: dict[str, Callable[[Data], Any]] = {"engine": partial(racer.engines, *pair)}
        runs |= {str(config): partial(racer.ours, config) for config in best}
        graphs = {run_name: racer.graph(run, sets) for run_name, run in runs.items()}
        times = dict(zip(graphs, racer.timed(list(graphs.values()), sets, arguments.rounds), strict=True))
        fastest = min(best, key=lambda config: median(times[str(config)]))
        with_pdl = dependent_launch.is_available
        dependent_launch.is_available = lambda sm: False
        few_tokens._down_constants.cache_clear()
        few_tokens._up_constants.cache_clear()
        alone = racer.graph(partial(racer.ours, replace(fastest, down=replace(fastest.down, prefetched=0))), sets)
        dependent_launch.is_available = with_pdl
        wide_range_us = None
        if shape.quantization.scheme and m in (1, 8):
            wide = racer.graph(partial(racer.ours, replace(fastest, wide_range=True)), sets)
            wide_range_us = median(racer.timed([wide], sets, arguments.rounds)[0])
        few_tokens._down_constants.cache_clear()
        few_tokens._up_constants.cache_clear()
        no_pdl = median(racer.timed([alone], sets, arguments.rounds)[0])
        up_us, down_us = racer.by_launch(fastest, sets)
        engine_us, ours_us = median(times["engine"]), median(times[str(fastest)])
        read = sum(int(data.ids.unique().numel()) for data in sets) / len(sets) * _expert_bytes(shape)
        error, of_scheme = racer.errors(racer.ours(fastest, sets[1]), sets[1])
        engine_error, engine_of_scheme = racer.errors(racer.engines(*pair, sets[1]), sets[1])
        row = {
            "layer": name, "m": m, "engine_us": engine_us, "ours_us": ours_us, "ratio": engine_us / ours_us,
            "no_pdl_us": no_pdl, "wide_range_us": wide_range_us, "up_us": up_us, "down_us": down_us,
            "tbs": read / ours_us / 1e6, "error": error, "error_of_scheme": of_scheme, "engine_error": engine_error,
            "engine_error_of_scheme": engine_of_scheme, "bits": racer.replay_gives_the_eager_bits(fastest, sets),
            "config": str(fastest), "engine": f"up {pair[0]}, down {pair[1]}",
            "finalists": {n: median(us) for n, us in times.items()},
            "screens": screens, "engine_screens": engine_screens,
        }  # fmt: skip
        rows.append(row)
        print(_cells(row), flush=True)
        torch.cuda.empty_cache()
    if arguments.lock:
        held.close()
    return rows


_HEADER = """\
| layer | M | ours us | engine us | ratio | TB/s | up, down alone | no PDL us | wide range us | error: exact, \
of the scheme | engine's | graph gives the eager bits | ours | engine |
|---|---:|---:|---:|---:|---:|---|---:|---:|---|---|---|---|---|"""


def _cells(row: dict[str, Any]) -> str:
    wide = row["wide_range_us"]
    cells = (
        row["layer"],
        str(row["m"]),
        f"{row['ours_us']:.1f}",
        f"{row['engine_us']:.1f}",
        f"{row['ratio']:.3f}x",
        f"{row['tbs']:.2f}",
        f"{row['up_us']:.1f}, {row['down_us']:.1f}",
        f"{row['no_pdl_us']:.1f}",
        "" if wide is None else f"{wide:.1f}",
        f"{row['error']:.1e}, {row['error_of_scheme']:.1e}",
        f"{row['engine_error']:.1e}, {row['engine_error_of_scheme']:.1e}",
        str(row["bits"]),
        row["config"].removeprefix("FEW TOKENS "),
        row["engine"],
    )
    return f"| {' | '.join(cells)} |"


def _expert_bytes(shape: MoEShape) -> int:
    return 3 * shape.intermediate_size * shape.hidden_size * shape.quantization.weight_bits // 8


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 an error in one line, 2 usage."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS)[:4], metavar="NAME")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), metavar="M")
    parser.add_argument("--rounds", type=int, default=32)
    parser.add_argument("--sm", type=int, default=90)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lock", type=Path, help="a file: of several processes one measures at a time")
    arguments = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        try:
            rows = [row for name in arguments.layers for row in measure(name, arguments.tokens, arguments)]
        except MoEExtError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(f"`{shlex.join(['python', '-m', 'benchmarks.few_tokens', *given])}`")
    if arguments.out:
        arguments.out.write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
