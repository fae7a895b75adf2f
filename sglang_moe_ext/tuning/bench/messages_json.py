"""One line of a journal: a request with its result, to JSON and back. Parsing is strict, since files are untrusted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from sglang_moe_ext.core import CompileKey, Failure, StoreError, TableError, TileConfig
from sglang_moe_ext.kernel_plans import KernelPlan, Plan
from sglang_moe_ext.tables import plan_table
from sglang_moe_ext.tables.config_table import ROCM_OPTIONS
from sglang_moe_ext.tuning.bench import messages
from sglang_moe_ext.tuning.bench.messages import (
    Accuracy,
    BenchGemm,
    BenchKernelPlan,
    BenchLayers,
    BenchRequest,
    BenchResult,
    CheckAccuracy,
    GemmTimes,
    LayerTimes,
    LibraryLayer,
    Pair,
    Runner,
)

_LARGEST = 2**31 - 1
_LONGEST_MESSAGE = 1000
_OPTION_COUNTS = (0, len(ROCM_OPTIONS))
# JSON has no such numbers.
_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def identity(request: BenchRequest) -> Hashable:
    """Equal for two requests that ask for the same measurement; the limit of a BenchGemm does not count."""
    match request:
        case BenchGemm():
            return BenchGemm, request.tokens, request.projection, request.key, request.groups, request.samples
        case BenchKernelPlan():
            return request
        case BenchLayers():
            runners = tuple(map(messages.identity, request.pairs))
            numbers = request.rounds, request.attempt, request.data, request.in_graph
            return BenchLayers, request.tokens, runners, *numbers
        case CheckAccuracy():
            return CheckAccuracy, request.tokens, messages.identity(request.pair)


def to_json(request: BenchRequest, result: BenchResult) -> str:
    """The line, without its end. Times are rounded to 0.01 us, errors to six digits, long messages cut."""
    return json.dumps(_request_fields(request) | _result_fields(result), separators=(",", ":"), allow_nan=False)


def _request_fields(request: BenchRequest) -> dict[str, object]:
    match request:
        case BenchGemm(tokens, projection, key, groups, samples):
            numbers = [key.block_m, key.block_n, key.block_k, key.num_warps, key.num_stages, key.use_tma]
            numbers += _options(key)
            return {"s": [tokens, projection, numbers, groups, samples]}
        case BenchKernelPlan(tokens, plan, samples):
            return {"p": [tokens, plan_table.document_of(plan), samples]}
        case BenchLayers(tokens, runners, rounds, attempt, data, in_graph):
            graph = [in_graph] if in_graph else []
            return {"r": [tokens, [_of_runner(runner) for runner in runners], rounds, attempt, data, *graph]}
        case CheckAccuracy(tokens, runner):
            return {"c": [tokens, _of_runner(runner)]}


def _of_runner(runner: Runner) -> object:
    if isinstance(runner, LibraryLayer):
        return {"library": runner.name}
    if isinstance(runner, Plan):
        return plan_table.document_of(runner)
    return [_of_config(runner["up"]), _of_config(runner["down"])]


def _of_config(config: TileConfig) -> list[int]:
    tile = [config.block_m, config.block_n, config.block_k]
    return [*tile, config.group_m, config.num_warps, config.num_stages, config.use_tma, *_options(config)]


def _options(config: TileConfig | CompileKey) -> list[int]:
    """Those for AMD GPUs, nothing where they are Triton's defaults."""
    options = [getattr(config, name) for name in ROCM_OPTIONS]
    return [] if options == list(ROCM_OPTIONS.values()) else options


def _result_fields(result: BenchResult) -> dict[str, object]:
    match result:
        case GemmTimes(us):
            return {"us": _of_times(us)}
        case LayerTimes(us, routings, throttled, sm_clock_mhz):
            # NVML may tell 0 MHz, which is no clock.
            return {"us": _of_times(us), "n": routings, "why": throttled, "mhz": sm_clock_mhz or None}
        case Accuracy(error):
            return {"e": float(f"{error:.6g}") if math.isfinite(error) else str(error)}
        case Failure(kind, message):
            return {"f": [kind, message[:_LONGEST_MESSAGE]]}


def _of_times(rows: Sequence[Sequence[float]]) -> list[list[float | str]]:
    return [[round(us, 2) if math.isfinite(us) else str(us) for us in row] for row in rows]


def parse(document: object) -> tuple[BenchRequest, BenchResult]:
    """The request and the result that a line's JSON document means.

    Raises:
        StoreError: it means none.
    """
    match document:
        case {"f": failure, **of_failure}:
            return _request(of_failure), _failure(failure)
        case {"us": us, "n": routings, "why": throttled, "mhz": sm_clock_mhz, "r": fields, **rest} if not rest:
            layers = _bench_layers(fields)
            times = _times(us, len(layers.pairs), range(layers.rounds, layers.rounds + 1))
            _whole(routings)
            return layers, LayerTimes(times, routings, _text(throttled), _clock(sm_clock_mhz))
        case {"us": us, **of_screen}:
            match screen := _request(of_screen):
                case BenchGemm():
                    return screen, GemmTimes(_times(us, len(screen.groups), range(screen.samples + 1)))
                case BenchKernelPlan():
                    return screen, GemmTimes(_times(us, 1, range(screen.samples, screen.samples + 1)))
        case {"e": error, "c": fields, **rest} if not rest:
            return _check_accuracy(fields), Accuracy(_figure(error))
    raise StoreError(f"expected a request and its result, found {_shown(document)}")


def _request(document: Any) -> BenchRequest:
    parsers: dict[str, Callable[[Any], BenchRequest]] = {
        "s": _bench_gemm,
        "p": _bench_plan,
        "r": _bench_layers,
        "c": _check_accuracy,
    }
    match list(document.items()):
        case [(name, asked)] if name in parsers:
            return parsers[name](asked)
    raise StoreError(f"expected a request, found {_shown(document)}")


def _bench_gemm(document: Any) -> BenchGemm:
    match document:
        case [
            tokens,
            ("up" | "down") as projection,
            [m, n, k, warps, stages, bool() as tma, *options],
            [_, *_] as groups,
            samples,
        ] if len(options) in _OPTION_COUNTS:
            _whole(tokens, m, n, k, warps, stages, samples, *groups)
            _whole(*options, least=0)
            key = CompileKey(m, n, k, warps, stages, tma, *options)
            return BenchGemm(tokens, projection, key, tuple(groups), samples)
    raise StoreError(f"expected tokens, projection, key, groups and samples, found {_shown(document)}")


def _bench_plan(document: Any) -> BenchKernelPlan:
    match document:
        case [tokens, plan, samples]:
            _whole(tokens, samples)
            if isinstance(found := _plan(plan), KernelPlan):
                return BenchKernelPlan(tokens, found, samples)
    raise StoreError(f"expected tokens, a kernel plan and samples, found {_shown(document)}")


def _bench_layers(document: Any) -> BenchLayers:
    match document:
        case [tokens, [_, *_] as runners, rounds, attempt, data, *graph] if graph in ([], [True]):
            _whole(tokens, rounds)
            _whole(attempt, data, least=0)
            return BenchLayers(tokens, tuple(map(_runner, runners)), rounds, attempt, data, graph == [True])
    raise StoreError(f"expected tokens, pairs, rounds, attempt, data and perhaps true, found {_shown(document)}")


def _check_accuracy(document: Any) -> CheckAccuracy:
    match document:
        case [tokens, pair]:
            _whole(tokens)
            return CheckAccuracy(tokens, _runner(pair))
    raise StoreError(f"expected tokens and a pair, found {_shown(document)}")


def _runner(document: Any) -> Runner:
    match document:
        case {"library": str(name), **rest} if not rest:
            return LibraryLayer(name)
        case dict():
            return _plan(document)
    return _pair(document)


def _plan(document: Any) -> Plan:
    try:
        return plan_table.parse_plan(document)
    except TableError as error:
        raise StoreError(str(error)) from error


def _pair(document: Any) -> Pair:
    match document:
        case [up, down]:
            pair: Pair = {"up": _config(up), "down": _config(down)}
            if pair["up"].block_m == pair["down"].block_m:
                return pair
    raise StoreError(f"expected an up and a down configuration of one BLOCK_SIZE_M, found {_shown(document)}")


def _config(document: Any) -> TileConfig:
    match document:
        case [m, n, k, group, warps, stages, bool() as tma, *options] if len(options) in _OPTION_COUNTS:
            _whole(m, n, k, group, warps, stages)
            _whole(*options, least=0)
            return TileConfig(m, n, k, group, warps, stages, tma, *options)
    raise StoreError(f"expected six numbers and true or false of a configuration, found {_shown(document)}")


def _failure(document: Any) -> Failure:
    match document:
        case [str() as kind, str() as message]:
            return Failure(kind, message)
    raise StoreError(f"expected kind and message of a failure, found {_shown(document)}")


def _times(rows: Any, count: int, of_each: range) -> tuple[tuple[float, ...], ...]:
    """`count` rows of so many times; of a group that was given up, a screen has fewer or none."""
    if not isinstance(rows, list) or len(rows) != count:
        raise StoreError(f"expected {count} rows of times, found {_shown(rows)}")
    for row in rows:
        if not isinstance(row, list) or len(row) not in of_each:
            raise StoreError(f"expected {of_each[0]} to {of_each[-1]} times in a row, found {_shown(row)}")
    return tuple([tuple([_figure(us) for us in row]) for row in rows])


def _figure(value: Any) -> float:
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) is int and abs(value) <= _LARGEST:
        return float(value)
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    raise StoreError(f"expected a number, inf, -inf or nan, found {_shown(value)}")


def _whole(*numbers: Any, least: int = 1) -> None:
    for number in numbers:
        if type(number) is not int or not least <= number <= _LARGEST:  # True is an int as well
            raise StoreError(f"expected a whole number from {least} to {_LARGEST}, found {_shown(number)}")


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise StoreError(f"expected text or null, found {_shown(value)}")


def _clock(value: Any) -> int | None:
    if value is not None:
        _whole(value)
    return value  # type: ignore[no-any-return]


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
