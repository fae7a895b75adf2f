"""Turn plans, results and findings into tables for people and one JSON document for programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_moe_ext import report_entries
from sglang_moe_ext.core import CompileKey, Origin
from sglang_moe_ext.engines.sglang import naming
from sglang_moe_ext.engines.vllm import naming as vllm_naming
from sglang_moe_ext.roofline import pair_floor_us
from sglang_moe_ext.sorted_path import SortedPath
from sglang_moe_ext.terminal import Grid
from sglang_moe_ext.tuning.comparison import Compared
from sglang_moe_ext.tuning.pipeline import Outcome
from sglang_moe_ext.tuning.plan import Plan
from sglang_moe_ext.tuning.predict import Predicted
from sglang_moe_ext.tuning.questions import Pair
from sglang_moe_ext.tuning.rematch import Measured
from sglang_moe_ext.tuning.request import Request
from sglang_moe_ext.tuning.space import RULES


def names_of(request: Request) -> dict[str, str]:
    """The names of the layer's tables in the tuned engine, and in vLLM; of a bare shape, for the same tensors."""
    device = request.gpu.device_name
    vllm_shape = request.vllm_shape or request.shape
    of_vllm = {"vLLM": vllm_naming.file_name(vllm_naming.table_key(vllm_shape, device))}
    if request.engine == "vllm":
        return of_vllm
    return {
        "SGLang": naming.file_name(naming.table_key(request.shape, device)),
        "SGLang, down projection": naming.file_name(naming.table_key(request.shape, device, down=True)),
        **of_vllm,
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
        rows = [
            row
            for m, result in _measured(outcome).items()
            for row in (
                *report_entries.measured_rows(m, result, floors[m]),
                *report_entries.path_rows(outcome.paths.get(m), floors[m]),
            )
        ]
        if any(isinstance(raced.pair, SortedPath) for raced in outcome.paths.values()):
            title += "\nkernel: our own kernels, which a server with this plugin runs there; gain: over what is above"
        title += "\nus: whole layer; roof: how much of the GEMM roofline that is; gain: with its 95 % interval"
        columns = ["M", "", "configuration", "us", "gain", "roof", "error"]
        return Grid(title, columns, rows, frozenset({"", "configuration", "gain"}))
    predicted = {m: result for m, result in outcome.results.items() if isinstance(result, Predicted)}
    columns = ["M", "configuration", "predicted us", "floor us", "shared memory", "registers"]
    rows = [report_entries.predicted_row(m, result, floors[m]) for m, result in predicted.items()]
    return Grid(title, columns, rows, frozenset({"configuration"}))


def _measured(outcome: Outcome) -> dict[int, Measured[Pair]]:
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
        "paths": [report_entries.raced_path(m, raced) for m, raced in outcome.paths.items()],
        "measurements": [report_entries.measurement(m, result) for m, result in _measured(outcome).items()],
    }


def comparison(request: Request, found: Mapping[int, Compared]) -> Grid:
    """Each choice at each M: what the engine takes today, and what was given."""
    names = list(next(iter(found.values())).pairs)
    short = {name: name if place == 0 else f"given {place}" for place, name in enumerate(names)}
    legend = "".join(f"\n{short[name]}: {name}" for name in names[1:])
    title = f"MEASURED for {request.gpu.device_name}{legend}"
    title += "\nus: whole layer; gain: over today, with its 95 % interval; error: relative, against float32"
    rows = [
        row
        for m, of_m in found.items()
        for place, (name, pair) in enumerate(of_m.pairs.items())
        for row in report_entries.pair_rows(
            [str(m) if place == 0 else "", short[name]],
            pair,
            report_entries.compared_cells(request.shape, name, of_m.results[name]),
        )
    ]
    columns = ["M", "choice", "configuration", "us", "gain", "error"]
    return Grid(title, columns, rows, frozenset({"choice", "configuration", "gain", "error"}))


def comparison_document(request: Request, found: Mapping[int, Compared]) -> Mapping[str, Any]:
    """The comparison for programs."""
    return {
        "origin": "measured",
        "model": request.model,
        "gpu": request.gpu.device_name,
        "comparisons": [
            {
                "m": m,
                "noise": None if of_m.noise is None else round(of_m.noise, 5),
                "throttled": of_m.throttled is not None,
                "choices": [
                    {
                        "choice": name,
                        **report_entries.pair_entry(pair),
                        **report_entries.compared_entry(request.shape, of_m.results[name]),
                    }
                    for name, pair in of_m.pairs.items()
                ],
            }
            for m, of_m in found.items()
        ],
    }


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
