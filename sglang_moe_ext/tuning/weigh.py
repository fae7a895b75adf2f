"""Weigh a tuning run before it is made: its plan, a guess where no engine can be asked, a short measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sglang_moe_ext.core import Table
from sglang_moe_ext.engines.lookup_probe import LookupResult
from sglang_moe_ext.tables import config_table, merge
from sglang_moe_ext.tuning import compare_configs, install_target, known_tables, pipeline, tune_plan, worth
from sglang_moe_ext.tuning.bench.messages import Pair
from sglang_moe_ext.tuning.compare_configs import ConfigComparison, TimedConfig
from sglang_moe_ext.tuning.request import MeasureOptions, Progress, TuneRequest
from sglang_moe_ext.tuning.search import final_comparison
from sglang_moe_ext.tuning.search.statistics import Interval
from sglang_moe_ext.tuning.tune_plan import TunePlan
from sglang_moe_ext.tuning.worth import DECODE_CONTEXT, Worth

TIMED_TOKENS = (1, 16, 64, 256, 1024, 4096, 8192)
"""What is timed where the GPU is here: few enough for about ten seconds, the start of the engine apart."""
_BEST = "the model's best"


@dataclass(frozen=True, slots=True)
class Weighed:
    """The plan of a run, and what the run could win."""

    plan: TunePlan
    worth: Worth


def weigh(request: TuneRequest, progress: Progress, *, ask: bool = False, context: int = DECODE_CONTEXT) -> Weighed:
    """What a run could win; where the request measures, the model's best candidates are timed beside today's choice.

    `ask`: start the engine, also where its lookup can be run from its files alone.

    Raises:
        MoEExtError: the engine, the store, the GPU or the model refuses.
    """
    plan = pipeline.make_plan(request, progress, ask=ask)
    is_asked = plan.today is not None
    if not is_asked and (guess := guess_today(request)) is not None:
        plan = tune_plan.make_plan(request, guess)
    measured = {} if request.measuring is None else _measure(request, request.measuring, plan, progress)
    return Weighed(plan, worth.estimate(request, plan, measured, is_asked=is_asked, context=context))


def guess_today(request: TuneRequest) -> LookupResult | None:
    """What a server with our plugin takes if nothing else is installed: a measured table that is known; None: nothing.

    Raises:
        TableError: a file of that name is no table.
    """
    found = known_tables.find_measured(request.problem)
    if found is None:
        return None
    whose, path = found
    stored = merge.read(path)
    names = install_target.table_names(request.adapter, request.shape, request.gpu.device_name)
    beside = merge.read(path.with_name(names[True])) if True in names else None
    up: Table = {} if stored is None else stored.table
    down: Table = {} if beside is None else beside.table
    taken = {m: config_table.nearest(up, m) for m in request.tokens}
    origins = {m: stored and stored.provenance and stored.provenance.origin(key) for m, key in taken.items()}
    return LookupResult(
        engine_version="",
        triton=request.problem.triton,
        device_name=request.gpu.device_name,
        up={m: up[key] for m, key in taken.items()},
        down={m: down[config_table.nearest(down, m)] if down else None for m in request.tokens},
        files=(path,),
        log=(),
        whys={m: f"the table {whose}, entry {taken[m]}; {origins[m] or 'origin unknown'}" for m in request.tokens},
    )


def _measure(
    request: TuneRequest, measuring: MeasureOptions, plan: TunePlan, progress: Progress
) -> Mapping[int, Interval]:
    """By M, the gain of the model's best candidate over today's choice, where both run and are right."""
    tokens = tuple(m for m in request.tokens if m in TIMED_TOKENS) or request.tokens[: len(TIMED_TOKENS)]
    best: dict[int, Pair] = {row.tokens: {"up": row.best, "down": row.best} for row in plan.rows}
    short = replace(measuring, effort="quick")
    found = compare_configs.run(replace(request, tokens=tokens), short, {_BEST: best}, progress)
    gains = {m: _gain(request, of_m) for m, of_m in found.items()}
    return {m: gain for m, gain in gains.items() if gain is not None}


def _gain(request: TuneRequest, compared: ConfigComparison) -> Interval | None:
    match compared.results[_BEST]:
        case TimedConfig(_, gain, float(error)) if final_comparison.is_right(request.shape, error):
            return gain
    return None
