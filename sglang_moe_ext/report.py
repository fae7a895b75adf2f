"""Turn plans, results and findings into tables for people and one JSON document for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from sglang_moe_ext.core import CompileKey, Origin, TileConfig
from sglang_moe_ext.engines.sglang import naming
from sglang_moe_ext.engines.vllm import naming as vllm_naming
from sglang_moe_ext.roofline import pair_floor_us
from sglang_moe_ext.store import tables
from sglang_moe_ext.terminal import Grid
from sglang_moe_ext.tuning.pipeline import Outcome
from sglang_moe_ext.tuning.plan import Plan
from sglang_moe_ext.tuning.predict import Predicted
from sglang_moe_ext.tuning.questions import Pair
from sglang_moe_ext.tuning.rematch import Measured
from sglang_moe_ext.tuning.request import Request
from sglang_moe_ext.tuning.space import RULES


def names_of(request: Request) -> dict[str, str]:
    """The names of the layer's tables in each engine's dialect; of a bare shape, vLLM's is for the same tensors."""
    device = request.gpu.device_name
    vllm_shape = request.vllm_shape or request.shape
    return {
        "SGLang": naming.file_name(naming.table_key(request.shape, device)),
        "SGLang, down projection": naming.file_name(naming.table_key(request.shape, device, down=True)),
        "vLLM": vllm_naming.file_name(vllm_naming.table_key(vllm_shape, device)),
    }


def candidates(plan: Plan) -> Grid:
    """What each rule dropped, and what is left."""
    whys = {rule.name: rule.why for rule in RULES}
    keys: set[CompileKey] = {config.compile_key for config in plan.sifted.kept}
    rows = [[f"dropped: {name}", str(count), whys[name]] for name, count in plan.sifted.dropped.items()]
    rows.append(["kept", str(len(plan.sifted.kept)), f"{len(keys)} binaries a GEMM, apart from GROUP_SIZE_M"])
    return Grid("candidates", ["rule", "count", "why"], rows, frozenset({"rule", "why"}))


def forecast(plan: Plan) -> Grid:
    """The floor, and the predicted times of today's choice and of the best candidate, by M."""
    rows = [
        [
            str(row.tokens),
            f"{row.floor_us:.1f}",
            "-" if row.incumbent_us is None else f"{row.incumbent_us:.1f}",
            f"{row.best_us:.1f}",
            "-" if row.incumbent_us is None else f"{row.incumbent_us / row.best_us:.2f}x",
            str(row.best),
        ]
        for row in plan.rows
    ]
    columns = ["M", "floor us", "today us", "best us", "gain", "best candidate"]
    title = "forecast of the up and down GEMM together (all predicted)"
    return Grid(title, columns, rows, frozenset({"best candidate"}))


def results(request: Request, outcome: Outcome) -> Grid:
    """What was chosen for each M."""
    floors = {m: pair_floor_us(request.shape, request.gpu, m) for m in outcome.results}
    title = f"{origin(outcome).upper()} for {request.gpu.device_name}, with {outcome.kernel.name}"
    if origin(outcome) == "measured":
        rows = [row for m, result in _measured(outcome).items() for row in _measured_rows(m, result, floors[m])]
        title += "\nus: whole layer; roof: how much of the GEMM roofline that is; gain: with its 95 % interval"
        columns = ["M", "", "configuration", "us", "gain", "roof", "error"]
        return Grid(title, columns, rows, frozenset({"", "configuration", "gain"}))
    predicted = {m: result for m, result in outcome.results.items() if isinstance(result, Predicted)}
    columns = ["M", "configuration", "predicted us", "floor us", "shared memory", "registers"]
    rows = [_predicted_row(m, result, floors[m]) for m, result in predicted.items()]
    return Grid(title, columns, rows, frozenset({"configuration"}))


def _predicted_row(tokens: int, result: Predicted, floor_us: float) -> list[str]:
    needs = result.resources.values()
    smem, registers = max(need.smem_bytes for need in needs), max(need.registers for need in needs)
    return [str(tokens), str(result.config), f"{result.us:.1f}", f"{floor_us:.1f}", f"{smem} B", str(registers)]


def _measured_rows(tokens: int, result: Measured, floor_us: float) -> list[list[str]]:
    """The incumbent above the choice, so that a terminal of 100 columns has room for both; once where it stays."""
    error = f"{result.error:.0e}"
    if result.pair == result.incumbent:
        return _rows(
            [str(tokens), "stays"], result.pair, [f"{result.us:.1f}", "", f"{floor_us / result.us:.0%}", error]
        )
    gain, had_us = result.gain, result.incumbent_us
    if math.isfinite(had_us):
        before = [f"{had_us:.1f}", "", f"{floor_us / had_us:.0%}", ""]
        interval = f"{gain.value:.2f}x [{gain.low:.2f}, {gain.high:.2f}]"
    else:
        before, interval = ["fails", "", "", ""], "now it runs"
    after = [f"{result.us:.1f}", interval, f"{floor_us / result.us:.0%}", error]
    return [
        *_rows([str(tokens), "before"], result.incumbent, before),
        *_rows(["", "after"], result.pair, after),
    ]


def _rows(left: list[str], pair: Pair, right: list[str]) -> list[list[str]]:
    """One row where both GEMMs take one configuration, else one for each."""
    if pair["up"] == pair["down"]:
        return [[*left, f"both {pair['up']}", *right]]
    return [
        [*left, f"up   {pair['up']}", *right],
        [*("" for _ in left), f"down {pair['down']}", *("" for _ in right)],
    ]


def _measured(outcome: Outcome) -> dict[int, Measured]:
    return {m: result for m, result in outcome.results.items() if isinstance(result, Measured)}


def origin(outcome: Outcome) -> Origin:
    """Whether the results were measured or predicted."""
    return "measured" if _measured(outcome) else "predicted"


def document(request: Request, outcome: Outcome) -> Mapping[str, Any]:
    """The outcome for programs."""
    return {
        "origin": origin(outcome),
        "model": request.model,
        "gpu": request.gpu.device_name,
        "kernel": outcome.kernel.name,
        "written": [str(path) for path in outcome.written],
        "refused": {str(path): why for path, why in outcome.refused.items()},
        "environment": {} if outcome.destination is None else outcome.destination.environment,
        "picked_up": None if outcome.answer is None else True,
        "entries": len(outcome.results),
        "measurements": [_measurement(m, result) for m, result in _measured(outcome).items()],
    }


def _measurement(tokens: int, result: Measured) -> Mapping[str, Any]:
    """One M for programs; null where the incumbent cannot run, since JSON knows no infinity."""
    had_incumbent = math.isfinite(result.incumbent_us)
    return {
        "m": tokens,
        **{projection: _in_engines_spelling(config) for projection, config in result.pair.items()},
        "us": round(result.us, 2),
        "incumbent_us": round(result.incumbent_us, 2) if had_incumbent else None,
        "gain": round(result.gain.value, 4) if had_incumbent else None,
        "low": round(result.gain.low, 4) if had_incumbent else None,
        "high": round(result.gain.high, 4) if had_incumbent else None,
        "noise": None if result.noise is None else round(result.noise, 5),
        "error": result.error,
        "tried": result.tried,
        "failures": dict(result.failures),
        "throttled": result.throttled,
    }


def _in_engines_spelling(config: TileConfig) -> Any:
    (entry,) = json.loads(tables.to_json({1: config})).values()
    return entry


def plan_document(request: Request, plan: Plan) -> Mapping[str, Any]:
    """The plan for programs."""
    return {
        "dry_run": True,
        "model": request.model,
        "gpu": request.gpu.device_name,
        "names": names_of(request),
        "kept": len(plan.sifted.kept),
        "dropped": plan.sifted.dropped,
        "binaries": plan.binaries,
        "estimated_s": round(plan.estimated_s),
    }
