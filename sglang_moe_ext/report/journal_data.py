"""Read the journal of a tuning run into a report's values, by the same final comparison that the run made."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import cast

from sglang_moe_ext.core import Gpu, GpuError, ModelError, MoEExtError, MoEShape, StoreError
from sglang_moe_ext.engines.registry import ENGINES
from sglang_moe_ext.gpu.names import find_gpu
from sglang_moe_ext.gpu.roofline import pair_floor_us
from sglang_moe_ext.kernel_plans import Plan
from sglang_moe_ext.report import search_space
from sglang_moe_ext.report.run_data import NOT_RECORDED, KernelsRow, RegretRow, ReportedRun, SpaceMap, TokensRow
from sglang_moe_ext.schemes import find_row
from sglang_moe_ext.tuning import transfer
from sglang_moe_ext.tuning.bench import messages_json
from sglang_moe_ext.tuning.bench.messages import (
    BenchGemm,
    BenchLayers,
    BenchRequest,
    BenchResult,
    GemmTimes,
    LayerTimes,
    Measure,
    Pair,
    Runner,
    describe,
    identity,
)
from sglang_moe_ext.tuning.problem import Problem
from sglang_moe_ext.tuning.run import journal_reader, run_folder
from sglang_moe_ext.tuning.run.journal import UnknownRequestError
from sglang_moe_ext.tuning.run.journal_reader import Recording
from sglang_moe_ext.tuning.search import final_comparison
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice
from sglang_moe_ext.tuning.search.screening import Times
from sglang_moe_ext.tuning.transfer import JournalSource
from sglang_moe_ext.untrusted import show

MOST_BYTES = 64 << 20
"""Of an unpacked journal: an exhaustive search of 20 batch sizes writes about 4 MB."""
_MOST_TOKENS, _MOST_SAMPLES = 512, 250_000
_PIECE = 1 << 20
Progress = Callable[[int, int], None]
"""Told how much of how much is done."""


def unseen(done: int, of: int) -> None:
    """Progress that nobody looks at."""


def is_run(path: Path) -> bool:
    """Whether the path is one of a run: its folder, or its journal."""
    return path.is_dir() or path.name.endswith((".jsonl", ".jsonl.gz"))


def newest_run() -> Path:
    """The newest run of the user's store.

    Raises:
        StoreError: there is none.
    """
    for folder in run_folder.newest_first():
        if (folder / run_folder.JOURNAL).is_file():
            return folder
    raise StoreError(f"no run in {run_folder.root()}: name a run's folder, a journal or a table, or run tune first")


def read(path: Path, progress: Progress = unseen) -> ReportedRun:
    """What the run's journal says. `progress` is told how many numbers of tokens of how many are done.

    Raises:
        MoEExtError: it cannot be read, is no journal of a measuring run of a layer, or is too large.
    """
    journal = path / run_folder.JOURNAL if path.is_dir() else path
    where = show(str(path))
    try:
        _refuse_large(journal)
        recording = journal_reader.read(journal)
        source = transfer.source_of(recording)
    except (StoreError, ModelError) as error:
        raise StoreError(str(error) if where in str(error) else f"{where}: {error}") from error
    _refuse_impossible(where, recording)
    shape, times = source.shape, transfer.times_of(recording)
    notes = [] if recording.is_finished else ["the run was not finished, or is still going on"]
    gpu = _gpu(source.device_name, notes)
    rows = _rows(where, recording, shape, gpu, notes, progress)
    problem = None if gpu is None else Problem(shape, gpu, source.engine)
    space, regret = _search(problem, times, notes)
    adapter = ENGINES[source.engine]
    downs = (False, True) if adapter.HAS_DOWN_TABLES else (False,)
    return ReportedRun(
        kind="journal",
        source=where,
        name=str(shape),
        engine=source.engine,
        triton=source.triton,
        shape=shape,
        gpu=gpu,
        device_name=source.device_name,
        environment=_environment(recording, source),
        commands=(),
        rows=rows,
        tolerated_error=find_row(shape.quantization.scheme).tolerated_error,
        files=tuple(adapter.file_name(adapter.table_key(shape, source.device_name, down=down)) for down in downs),
        space=space,
        regret=regret,
        notes=tuple(notes),
    )


def _refuse_large(path: Path) -> None:
    """Raises StoreError where the journal has more bytes, unpacked, than any run writes."""
    try:
        if not path.is_file():
            return  # the reader says what is wrong with it
        if path.suffix != ".gz":
            unpacked = path.stat().st_size
        else:
            unpacked = 0
            with gzip.open(path) as file:
                while unpacked <= MOST_BYTES and (piece := file.read(_PIECE)):
                    unpacked += len(piece)
    except (OSError, EOFError, zlib.error):
        return
    if unpacked > MOST_BYTES:
        raise StoreError(f"{show(str(path))} is larger than {MOST_BYTES >> 20} MiB: name the journal of one run")


def _refuse_impossible(where: str, recording: Recording) -> None:
    """Raises StoreError where times are none, or are so many that no run has measured them."""
    samples, tokens = 0, set()
    for request, result in recording.results.values():
        tokens.add(request.tokens)
        rows = result.us if isinstance(result, GemmTimes | LayerTimes) else ()
        for us in rows:
            samples += len(us) if isinstance(result, LayerTimes) else 0
            if not all(0 < one < math.inf for one in us):
                raise StoreError(f"{where}: a time at M={request.tokens} is not a positive number: name another run")
    if samples > _MOST_SAMPLES or len(tokens) > _MOST_TOKENS:
        raise StoreError(
            f"{where} has {samples} samples of layers at {len(tokens)} numbers of tokens: "
            f"expected no more than {_MOST_SAMPLES} and {_MOST_TOKENS}"
        )


def _gpu(device_name: str, notes: list[str]) -> Gpu | None:
    try:
        return find_gpu(device_name)
    except GpuError as error:
        notes.append(f"no roofline, no map of the search space and no regret: {show(error)}")
        return None


def _environment(recording: Recording, source: JournalSource) -> tuple[tuple[str, str], ...]:
    stated = {name: NOT_RECORDED if value is None else show(value) for name, value in recording.circumstances.items()}
    always = dict.fromkeys(("gpu", "kernel", "torch", "driver", "routing", "seed", "sglang_moe_ext"), NOT_RECORDED)
    derived = {"engine": f"{source.engine} {show(source.version)}", "triton": show(source.triton)}
    missing = {"date": NOT_RECORDED, "command": NOT_RECORDED, "model": NOT_RECORDED}
    return tuple((show(name), value) for name, value in {**missing, **derived, **always, **stated}.items())


def _search(
    problem: Problem | None, times: Mapping[int, Times], notes: list[str]
) -> tuple[SpaceMap | None, tuple[RegretRow, ...]]:
    if problem is None:
        return None, ()
    if not times:
        notes.append("no candidate of a single GEMM is in this journal: no map of the search space and no regret")
        return None, ()
    try:
        return search_space.map_space(problem, times), search_space.rank_regret(problem, times)
    except (MoEExtError, ArithmeticError, ValueError) as error:
        notes.append(f"no map of the search space and no regret: {show(error)}")
        return None, ()


def _rows(
    where: str, recording: Recording, shape: MoEShape, gpu: Gpu | None, notes: list[str], progress: Progress
) -> tuple[TokensRow, ...]:
    measure = _replayed(recording)
    screened = _screened(recording)
    by_tokens = _comparisons(recording)
    every = sorted({request.tokens for request, _ in recording.results.values()})
    rows: list[TokensRow] = []
    unfinished: list[int] = []
    for done, m in enumerate(every, 1):
        floor_us = None if gpu is None else pair_floor_us(shape, gpu, m)
        try:
            chosen = _choose(by_tokens.get((m, False)), shape, measure)
            ours = _choose(by_tokens.get((m, True)), shape, measure)
        except UnknownRequestError:
            chosen = ours = None
        except (ArithmeticError, ValueError) as error:
            raise StoreError(f"{where}: the times at M={m} cannot be compared ({show(error)})") from error
        if chosen is None:
            unfinished.append(m)
        rows.append(_row(m, chosen, ours, floor_us, screened.get(m), by_tokens.get((m, True))))
        progress(done, len(every))
    if unfinished:
        notes.append(show(f"no finished comparison at M={', '.join(map(str, unfinished))}"))
    return tuple(rows)


def _comparisons(recording: Recording) -> dict[tuple[int, bool], BenchLayers]:
    """The first comparison of all finalists at each M, and whether our kernels were among them."""
    found: dict[tuple[int, bool], BenchLayers] = {}
    for request, _ in recording.results.values():
        if (
            isinstance(request, BenchLayers)
            and (request.data, request.attempt) == (0, 0)
            and len(request.pairs) > 1
            and identity(request.pairs[0]) == identity(request.pairs[-1])
        ):
            with_ours = any(isinstance(runner, Plan) for runner in request.pairs)
            found.setdefault((request.tokens, with_ours), request)
    return found


def _screened(recording: Recording) -> dict[int, int]:
    keys: dict[int, set[Hashable]] = {}
    for request, _ in recording.results.values():
        if isinstance(request, BenchGemm):
            keys.setdefault(request.tokens, set()).add((request.projection, request.key))
    return {m: len(of_m) for m, of_m in keys.items()}


def _replayed(recording: Recording) -> Measure:
    """The results of the journal alone; raises UnknownRequestError where it has none."""

    def read_result(request: BenchRequest) -> BenchResult:
        known = recording.results.get(messages_json.identity(request))
        if known is None:
            raise UnknownRequestError(f"no result for {request}")
        return known[1]

    return read_result


def _choose(comparison: BenchLayers | None, shape: MoEShape, measure: Measure) -> MeasuredChoice[Runner] | None:
    if comparison is None:
        return None
    incumbent, *finalists = comparison.pairs[:-1]
    return final_comparison.confirm(
        shape,
        comparison.tokens,
        finalists,
        incumbent,
        measure,
        rounds=comparison.rounds,
        tried=0,
        failures={},
        in_graph=comparison.in_graph,
    )


def _row(
    m: int,
    chosen: MeasuredChoice[Runner] | None,
    ours: MeasuredChoice[Runner] | None,
    floor_us: float | None,
    tried: int | None,
    comparison: BenchLayers | None,
) -> TokensRow:
    kernels = None
    if ours is not None and comparison is not None:
        kernels = _kernels_row(ours, in_graph=comparison.in_graph)
    if chosen is None:
        return TokensRow(m, None, None, None, floor_us=floor_us, tried=tried, kernels=kernels)
    pair = cast("Pair", chosen.pair)
    had_stock = math.isfinite(chosen.incumbent_us)
    return TokensRow(
        m=m,
        origin="measured",
        up=str(pair["up"]),
        down=str(pair["down"]),
        stock=describe(chosen.incumbent),
        stock_us=chosen.incumbent_us if had_stock else None,
        tuned_us=chosen.us,
        floor_us=floor_us,
        gain=chosen.gain if had_stock else None,
        noise=chosen.noise,
        error=chosen.error,
        clock_mhz=chosen.sm_clock_mhz,
        throttled=chosen.throttled,
        tried=tried,
        kernels=kernels,
    )


def _kernels_row(ours: MeasuredChoice[Runner], *, in_graph: bool) -> KernelsRow:
    if not isinstance(ours.pair, Plan):
        return KernelsRow(None, in_graph=in_graph)
    had_engine = math.isfinite(ours.incumbent_us)
    return KernelsRow(
        plan=str(ours.pair),
        us=ours.us,
        engine_us=ours.incumbent_us if had_engine else None,
        gain=ours.gain if had_engine else None,
        error=ours.error,
        in_graph=in_graph,
    )
