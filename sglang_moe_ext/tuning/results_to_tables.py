"""Turn the results of a run into tables with their provenance."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

from sglang_moe_ext import __version__
from sglang_moe_ext.core import MoEShape, Origin, Table
from sglang_moe_ext.engines import installed_engines
from sglang_moe_ext.engines.adapter import InstallationLike
from sglang_moe_ext.gpu.roofline import pair_floor_us
from sglang_moe_ext.kernel_plans import Plan
from sglang_moe_ext.tables import plan_table
from sglang_moe_ext.tables.merge import StoredTable
from sglang_moe_ext.tables.plan_table import KernelTable
from sglang_moe_ext.tables.provenance import Provenance, ProvenanceEntry, TuningRun
from sglang_moe_ext.tuning.bench.messages import Pair, Runner
from sglang_moe_ext.tuning.request import TuneRequest
from sglang_moe_ext.tuning.run.journal_reader import Recording
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice
from sglang_moe_ext.tuning.search.predict import PredictedConfig
from sglang_moe_ext.tuning.transfer import JournalSource
from sglang_moe_ext.tuning.versions import driver_version, version_of

Results = Mapping[int, PredictedConfig] | Mapping[int, MeasuredChoice[Pair]]


def circumstances(request: TuneRequest, engine: InstallationLike | None, kernel: str) -> TuningRun:
    """Where, when and with what the run takes place."""
    return TuningRun(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=request.command,
        model=request.model,
        shape=str(request.shape),
        gpu=request.gpu.device_name,
        kernel=kernel,
        engine=None if engine is None else f"{request.engine} {engine.version_text}",
        triton=installed_engines.running_triton(),
        torch=version_of("torch"),
        driver=None if request.measuring is None else driver_version(),
        seed=request.seed,
        sglang_moe_ext=__version__,
    )


def run_of_journal(journal: Recording, source: JournalSource, shape: MoEShape, command: str) -> TuningRun:
    """Where, when and with what the entries of a journal were timed; the shape is that of the engine they are for."""
    stated = journal.circumstances
    return TuningRun(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command,
        model=str(shape),
        shape=str(shape),
        gpu=source.device_name,
        kernel=str(stated["kernel"]),
        engine=f"{source.engine} {source.version}",
        triton=source.triton,
        torch=_text(stated.get("torch")),
        driver=_text(stated.get("driver")),
        seed=source.seed,
        sglang_moe_ext=__version__,
    )


def _text(stated: object) -> str | None:
    return None if stated is None else str(stated)


def for_any_engine(results: Results) -> Results:
    """The results that any release may read: SGLang up to 0.5.17 dies of a USE_TMA in the table of the up GEMM.

    An M is left out rather than written without: nothing was measured of that pair.
    """
    kept = {m: result for m, result in results.items() if not result.pair["up"].use_tma}
    return cast("Results", kept)


def config_tables(request: TuneRequest, results: Results, run: TuningRun) -> dict[bool, StoredTable]:
    """The up table (False), and the table for the down projection (True) where the engine has such."""
    pairs: dict[int, Pair] = {}
    entries: dict[int, ProvenanceEntry] = {}
    for m, result in results.items():
        floor = {"floor_us": round(pair_floor_us(request.shape, request.gpu, m), 2)}
        match result:
            case PredictedConfig():
                pairs[m] = result.pair
                entries[m] = _entry("predicted", run, floor | _of_prediction(result))
            case MeasuredChoice():
                pairs[m] = result.pair
                entries[m] = _entry("measured", run, floor | _of_measurement(result))
    up: Table = {m: pair["up"] for m, pair in pairs.items()}
    down: Table = {m: pair["down"] for m, pair in pairs.items()}
    of_up = {False: StoredTable(up, Provenance(entries))}
    return of_up | {True: StoredTable(down, Provenance(entries))} if request.adapter.HAS_DOWN_TABLES else of_up


def transferred_entries(run: TuningRun, times_us: Mapping[int, float]) -> dict[int, ProvenanceEntry]:
    """Of entries that were timed in another engine: the time of both GEMMs there."""
    return {m: _entry("transferred", run, {"gemms_us": round(us, 2)}) for m, us in times_us.items()}


def plans_table(found: Mapping[int, MeasuredChoice[Runner]], tokens: Iterable[int], run: TuningRun) -> KernelTable:
    """Kernel plans where they won; entries without one where they lost or were not tried, which replace older plans."""
    untried = {m: plan_table.KernelEntry(None, run) for m in tokens}
    return untried | {
        m: plan_table.KernelEntry(result.pair if isinstance(result.pair, Plan) else None, run, _of_measurement(result))
        for m, result in found.items()
    }


def _entry(origin: Origin, run: TuningRun, figures: dict[str, float]) -> ProvenanceEntry:
    return ProvenanceEntry(origin, run, figures)


def _of_prediction(result: PredictedConfig) -> dict[str, float]:
    figures: dict[str, float] = {"predicted_us": round(result.us, 2)}
    if result.gain is not None:
        figures["gain_predicted"] = round(result.gain, 4)
    if result.keeps_today:
        figures["keeps_today"] = 1.0
    for projection, needs in result.resources.items():
        figures[f"{projection}_smem_bytes"] = needs.smem_bytes
        figures[f"{projection}_registers"] = needs.registers
    return figures


def _of_measurement(result: MeasuredChoice[Any]) -> dict[str, float]:
    """What is known and finite: of an incumbent that cannot run, nothing is."""
    figures = {
        "us": (result.us, 2),
        "incumbent_us": (result.incumbent_us, 2),
        "gain": (result.gain.value, 4),
        "gain_low": (result.gain.low, 4),
        "gain_high": (result.gain.high, 4),
        "noise": (result.noise, 5),
        "relative_error": (result.error, 6),
        "sm_clock_mhz": (result.sm_clock_mhz, 0),
    }
    return {
        name: round(figure, digits)
        for name, (figure, digits) in figures.items()
        if figure is not None and math.isfinite(figure)
    }
