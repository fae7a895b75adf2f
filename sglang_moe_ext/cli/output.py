"""Turn plans, results and findings into tables for people and one JSON document for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from sglang_moe_ext.cli.console import Grid
from sglang_moe_ext.core import CompileKey, Failure, MoEShape, Origin, TileConfig
from sglang_moe_ext.engines.lookup_probe import LookupResult
from sglang_moe_ext.engines.sglang import table_names
from sglang_moe_ext.engines.vllm import table_names as vllm_naming
from sglang_moe_ext.gpu.roofline import pair_floor_us
from sglang_moe_ext.kernel_plans import Plan
from sglang_moe_ext.tables import config_table, plan_table
from sglang_moe_ext.tuning import incumbent_source
from sglang_moe_ext.tuning.bench.messages import Pair, Runner
from sglang_moe_ext.tuning.compare_configs import TODAY, ConfigComparison, TimedConfig
from sglang_moe_ext.tuning.incumbents import pairs_of
from sglang_moe_ext.tuning.pipeline import TuneOutcome
from sglang_moe_ext.tuning.request import TuneRequest
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice, is_right
from sglang_moe_ext.tuning.search.predict import PredictedConfig, estimate_us
from sglang_moe_ext.tuning.search.statistics import Interval
from sglang_moe_ext.tuning.tune_plan import TunePlan, rules_of

_LONGEST_REASON = 160
"""Characters of a failure in a table for people; the document has all."""


def predicted_row(tokens: int, result: PredictedConfig, today: Pair | None, today_us: float | None) -> list[str]:
    """What is new beside what the engine runs today, both predicted."""
    gain = "-" if today_us is None else f"{today_us / result.us:.2f}x"
    had = ["-", "-"] if today is None or today_us is None else [_short(today), f"{today_us:.1f}"]
    new = "stays" if result.keeps_today else str(result.config)
    return [str(tokens), *had, new, f"{result.us:.1f}", gain]


def _short(pair: Pair) -> str:
    return str(pair["up"]) if pair["up"] == pair["down"] else f"{pair['up']} / {pair['down']}"


def incumbents(request: TuneRequest, outcome: TuneOutcome) -> dict[int, tuple[Pair, float]]:
    """What the engine ran before, with its predicted time in microseconds; empty where it was not asked."""
    if outcome.today is None:
        return {}
    pairs = pairs_of(outcome.today)
    return {m: (pair, estimate_us(pair, request.problem, m)) for m, pair in pairs.items()}


def measured_rows(tokens: int, result: MeasuredChoice[Pair], floor_us: float) -> list[list[str]]:
    """The incumbent above the choice, so that a terminal of 100 columns has room for both; once where it stays."""
    error = f"{result.error:.0e}"
    if result.pair == result.incumbent:
        return pair_rows(
            [str(tokens), "stays"], result.pair, [f"{result.us:.1f}", "", f"{floor_us / result.us:.0%}", error]
        )
    gain, had_us = result.gain, result.incumbent_us
    if math.isfinite(had_us):
        before = [f"{had_us:.1f}", "", f"{floor_us / had_us:.0%}", ""]
        interval = _interval(gain)
    else:
        before, interval = ["fails", "", "", ""], "now it runs"
    after = [f"{result.us:.1f}", interval, f"{floor_us / result.us:.0%}", error]
    return [
        *pair_rows([str(tokens), "before"], result.incumbent, before),
        *pair_rows(["", "after"], result.pair, after),
    ]


def path_rows(raced: MeasuredChoice[Runner] | None, floor_us: float) -> list[list[str]]:
    """Our own path, below the pair that it beat; nothing where it did not."""
    if raced is None or not isinstance(raced.pair, Plan):
        return []
    up, down = raced.pair.up, raced.pair.down
    engines = "engine's " if isinstance(up, TileConfig) else ""
    figures = [f"{raced.us:.1f}", _interval(raced.gain), f"{floor_us / raced.us:.0%}", f"{raced.error:.0e}"]
    return [["", "kernel", f"up   {engines}{up}", *figures], ["", "", f"down {down}", *("" for _ in figures)]]


def pair_rows(left: list[str], pair: Pair, right: list[str]) -> list[list[str]]:
    """One row where both GEMMs take one configuration, else one for each."""
    if pair["up"] == pair["down"]:
        return [[*left, f"both {pair['up']}", *right]]
    return [
        [*left, f"up   {pair['up']}", *right],
        [*("" for _ in left), f"down {pair['down']}", *("" for _ in right)],
    ]


def compared_cells(shape: MoEShape, name: str, result: TimedConfig | Failure) -> list[str]:
    """The time, the gain and the error."""
    if isinstance(result, Failure):
        return ["fails", "", _on_one_line(result)]
    over_today = "" if name == TODAY else "today fails" if result.gain is None else _interval(result.gain)
    if isinstance(result.error, Failure):
        error = f"unknown: {_on_one_line(result.error)}"
    else:
        error = f"{result.error:.0e}" + ("" if is_right(shape, result.error) else " WRONG")
    return [f"{result.us:.1f}", over_today, error]


def _on_one_line(failure: Failure) -> str:
    return " ".join(f"{failure.kind}: {failure.message}".split())[:_LONGEST_REASON]


def _interval(gain: Interval) -> str:
    return f"{gain.value:.2f}x [{gain.low:.2f}, {gain.high:.2f}]"


def measurement(tokens: int, result: MeasuredChoice[Pair]) -> Mapping[str, Any]:
    """One M for programs; null where the incumbent cannot run, since JSON knows no infinity."""
    had_incumbent = math.isfinite(result.incumbent_us)
    return {
        "m": tokens,
        **pair_entry(result.pair),
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


def plan_measurement(tokens: int, raced: MeasuredChoice[Runner]) -> Mapping[str, Any]:
    """The race of one M between our own path and the chosen pair, for programs; `path` null where the pair won."""
    is_won = isinstance(raced.pair, Plan)
    return {
        "m": tokens,
        "path": plan_table.document_of(raced.pair) if isinstance(raced.pair, Plan) else None,
        "us": round(raced.us, 2),
        "pair_us": round(raced.incumbent_us, 2),
        "gain": round(raced.gain.value, 4) if is_won else None,
        "low": round(raced.gain.low, 4) if is_won else None,
        "high": round(raced.gain.high, 4) if is_won else None,
        "error": raced.error,
        "tried": raced.tried,
        "failures": dict(raced.failures),
    }


def compared_entry(shape: MoEShape, result: TimedConfig | Failure) -> Mapping[str, Any]:
    """`failure` says why it does not run, or why it could not be checked; null where both could be done."""
    failed = result if isinstance(result, Failure) else result.error if isinstance(result.error, Failure) else None
    timed = result if isinstance(result, TimedConfig) else None
    gain = None if timed is None else timed.gain
    error = None if timed is None or isinstance(timed.error, Failure) else timed.error
    return {
        "us": None if timed is None else round(timed.us, 2),
        "gain": None if gain is None else round(gain.value, 4),
        "low": None if gain is None else round(gain.low, 4),
        "high": None if gain is None else round(gain.high, 4),
        "error": error if error is not None and math.isfinite(error) else None,
        "right": error is not None and is_right(shape, error),
        "failure": None if failed is None else f"{failed.kind}: {failed.message}",
    }


def pair_entry(pair: Pair) -> Mapping[str, Any]:
    """Each GEMM's configuration, spelled as the engine does."""
    return {projection: _in_engines_spelling(config) for projection, config in pair.items()}


def _in_engines_spelling(config: TileConfig) -> Any:
    (entry,) = json.loads(config_table.to_json({1: config})).values()
    return entry


def names_of(request: TuneRequest) -> dict[str, str]:
    """The names of the layer's tables in the tuned engine, and in vLLM; of a bare shape, for the same tensors."""
    device = request.gpu.device_name
    vllm_shape = request.vllm_shape or request.shape
    of_vllm = {"vLLM": vllm_naming.file_name(vllm_naming.table_key(vllm_shape, device))}
    if request.engine == "vllm":
        return of_vllm
    return {
        "SGLang": table_names.file_name(table_names.table_key(request.shape, device)),
        "SGLang, down projection": table_names.file_name(table_names.table_key(request.shape, device, down=True)),
        **of_vllm,
    }


def candidates(plan: TunePlan) -> Grid:
    """What each rule dropped, and what is left."""
    whys = {rule.name: rule.why for rule in rules_of(plan.gpu)}
    keys: set[CompileKey] = {config.compile_key for config in plan.pruned.kept}
    rows = [[f"dropped: {name}", str(count), whys[name]] for name, count in plan.pruned.dropped.items()]
    rows.append(["kept", str(len(plan.pruned.kept)), f"{len(keys)} binaries a GEMM, apart from GROUP_SIZE_M"])
    return Grid("candidates", ["rule", "count", "why"], rows, frozenset({"rule", "why"}))


def forecast(plan: TunePlan) -> Grid:
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
    title = "forecast of the up and down GEMM together, all predicted; below M=64 a gain is within the model's error"
    return Grid(title, columns, rows, frozenset({"best candidate"}))


def results(request: TuneRequest, outcome: TuneOutcome) -> Grid:
    """What was chosen for each M."""
    floors = {m: pair_floor_us(request.shape, request.gpu, m) for m in outcome.results}
    title = f"{origin(outcome).upper()} for {request.gpu.device_name}, with {outcome.kernel.name}"
    if origin(outcome) == "measured":
        rows = [
            row
            for m, result in _measured(outcome).items()
            for row in (
                *measured_rows(m, result, floors[m]),
                *path_rows(outcome.plans.get(m), floors[m]),
            )
        ]
        if any(isinstance(raced.pair, Plan) for raced in outcome.plans.values()):
            title += "\nkernel: our own kernels, which a server with this plugin runs there; gain: over what is above"
        title += "\nus: whole layer; roof: how much of the GEMM roofline that is; gain: with its 95 % interval"
        columns = ["M", "", "configuration", "us", "gain", "roof", "error"]
        return Grid(title, columns, rows, frozenset({"", "configuration", "gain"}))
    predicted = {m: result for m, result in outcome.results.items() if isinstance(result, PredictedConfig)}
    before = incumbents(request, outcome)
    title += "\nus: up and down GEMM together, predicted as the gain is; below M=64 the gain is within its error"
    columns = ["M", "today", "today us", "new", "new us", "gain"]
    rows = [predicted_row(m, result, *before.get(m, (None, None))) for m, result in predicted.items()]
    return Grid(title, columns, rows, frozenset({"today", "new"}))


def _measured(outcome: TuneOutcome) -> dict[int, MeasuredChoice[Pair]]:
    return {m: result for m, result in outcome.results.items() if isinstance(result, MeasuredChoice)}


def origin(outcome: TuneOutcome) -> Origin:
    """Whether the results were measured or predicted."""
    return "measured" if _measured(outcome) else "predicted"


def document(request: TuneRequest, outcome: TuneOutcome) -> Mapping[str, Any]:
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
        "paths": [plan_measurement(m, raced) for m, raced in outcome.plans.items()],
        "measurements": [measurement(m, result) for m, result in _measured(outcome).items()],
        "predictions": _predictions(request, outcome),
        "today": _todays_sources(request, outcome.today),
    }


def gains(request: TuneRequest, outcome: TuneOutcome) -> dict[int, float]:
    """By number of tokens, how much faster the new configuration is than today's; where today's cannot run, nothing."""
    before = incumbents(request, outcome)
    found: dict[int, float] = {}
    for m, result in outcome.results.items():
        match result:
            case MeasuredChoice() if math.isfinite(result.incumbent_us):
                found[m] = result.gain.value
            case PredictedConfig() if m in before:
                found[m] = before[m][1] / result.us
    return found


def gain_line(found: Mapping[int, float], origin: Origin) -> str | None:
    """All gains in one line for people; None where there is nothing to compare with."""
    if not found:
        return None
    mean = math.exp(sum(map(math.log, found.values())) / len(found))
    best = max(found, key=lambda m: found[m])
    sizes = f"{len(found)} batch size{'s' if len(found) > 1 else ''}"
    return f"{origin} gain over today: {mean:.2f}x, the geometric mean of {sizes}; most {found[best]:.2f}x at M={best}"


def _predictions(request: TuneRequest, outcome: TuneOutcome) -> list[Mapping[str, Any]]:
    before = incumbents(request, outcome)
    return [
        {
            "m": m,
            "today": None if m not in before else pair_entry(before[m][0]),
            "today_us": None if m not in before else round(before[m][1], 2),
            "new": _in_engines_spelling(result.config),
            "new_us": round(result.us, 2),
            "gain": None if m not in before else round(before[m][1] / result.us, 4),
        }
        for m, result in outcome.results.items()
        if isinstance(result, PredictedConfig)
    ]


def _todays_sources(request: TuneRequest, answer: LookupResult | None) -> list[Mapping[str, Any]]:
    found = {} if answer is None else incumbent_source.sources(request, answer)
    return [{"m": m, "source": source.text, "ours": source.is_ours} for m, source in found.items()]


def comparison(request: TuneRequest, found: Mapping[int, ConfigComparison]) -> Grid:
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
        for row in pair_rows(
            [str(m) if place == 0 else "", short[name]],
            pair,
            compared_cells(request.shape, name, of_m.results[name]),
        )
    ]
    columns = ["M", "choice", "configuration", "us", "gain", "error"]
    return Grid(title, columns, rows, frozenset({"choice", "configuration", "gain", "error"}))


def comparison_document(request: TuneRequest, found: Mapping[int, ConfigComparison]) -> Mapping[str, Any]:
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
                        **pair_entry(pair),
                        **compared_entry(request.shape, of_m.results[name]),
                    }
                    for name, pair in of_m.pairs.items()
                ],
            }
            for m, of_m in found.items()
        ],
    }


def plan_document(request: TuneRequest, plan: TunePlan) -> Mapping[str, Any]:
    """The plan for programs."""
    return {
        "dry_run": True,
        "model": request.model,
        "gpu": request.gpu.device_name,
        "names": names_of(request),
        "kept": len(plan.pruned.kept),
        "dropped": plan.pruned.dropped,
        "binaries": plan.binaries,
        "estimated_s": round(plan.estimated_s),
        "today": _todays_sources(request, plan.today),
        "forecast": [
            {
                "m": row.tokens,
                "floor_us": round(row.floor_us, 2),
                "today_us": None if row.incumbent_us is None else round(row.incumbent_us, 2),
                "best_us": round(row.best_us, 2),
                "best": _in_engines_spelling(row.best),
            }
            for row in plan.rows
        ],
    }
