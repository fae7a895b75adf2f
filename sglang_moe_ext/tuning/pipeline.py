"""The order of a run: ask what the engine takes today, predict or measure, write, prove the pick-up."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

from sglang_moe_ext.core import EngineError, TileConfig
from sglang_moe_ext.engines import installed, lookup_memory
from sglang_moe_ext.engines.adapter import InstallationLike, ProbeLike
from sglang_moe_ext.engines.lookup_probe import LookupRequest, LookupResult
from sglang_moe_ext.tables import kernel_table, merge, provenance
from sglang_moe_ext.tables.kernel_table import KernelTable
from sglang_moe_ext.tables.merge import RefusedTable, StoredTable
from sglang_moe_ext.tuning import install_target, plan, results_to_tables, verify_install
from sglang_moe_ext.tuning.bench.messages import Runner
from sglang_moe_ext.tuning.compile.cache import CompileCache, default_path
from sglang_moe_ext.tuning.compile.kernel_source import KernelSource, kernel_source
from sglang_moe_ext.tuning.compile.pool import compile_all
from sglang_moe_ext.tuning.install_target import InstallTarget
from sglang_moe_ext.tuning.plan import TunePlan
from sglang_moe_ext.tuning.request import Progress, TuneRequest
from sglang_moe_ext.tuning.results_to_tables import Results
from sglang_moe_ext.tuning.run import session
from sglang_moe_ext.tuning.search import predict
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice
from sglang_moe_ext.tuning.search.predict import PredictedConfig


@dataclass(frozen=True, slots=True)
class TuneOutcome:
    """What came of a run. `plans`: the winner where our kernels were compared with the chosen pair.

    `answer` is the engine's proof of the pick-up, `today` its answer of what it ran before; None where there is no
    engine.
    """

    results: Results
    plans: Mapping[int, MeasuredChoice[Runner]]
    written: tuple[Path, ...]
    refused: dict[Path, str]
    destination: InstallTarget | None
    answer: LookupResult | None
    kernel: KernelSource
    today: LookupResult | None = None


def target_of(request: TuneRequest, engine: InstallationLike | None) -> InstallTarget | None:
    """Where the tables will go for a server to read, or None where the user's own store is the only place.

    Raises:
        EngineError: there is no Triton, or one that no engine reads tables of.
        StoreError: an overlay is needed and cannot be made.
    """
    triton = installed.running_triton()
    if triton is None:
        raise EngineError("no Triton is installed: `pip install triton` brings the compiler that tuning needs")
    return install_target.CHOOSERS[request.engine](request.install, request.output_dir, engine, triton)


def make_plan(request: TuneRequest, progress: Progress) -> TunePlan:
    """The plan of the run, against what the engine takes today; nothing is written anywhere.

    Raises:
        MoEExtError: any of ours.
    """
    if request.adapter.find() is None:
        return plan.make_plan(request, None)
    answer = _ask_today(request, progress)
    return replace(plan.make_plan(request, verify_install.pairs_of(answer)), today=answer)


def _ask_today(request: TuneRequest, progress: Progress) -> LookupResult:
    """What the engine takes now, from the answers that are remembered where nothing it could read has changed."""
    question = verify_install.lookup_request(request)
    engine = request.adapter.find()
    key = lookup_memory.key_of(engine, question, request.gpu.device_name)
    known = lookup_memory.recall(key)
    if known is not None:
        return known
    stage = _asking(request)
    progress(stage, 0, 1)
    with closing(request.adapter.start_probe(verify_install.environment({}))) as today:
        answer = today.answer(question)
    progress(stage, 1, 1)
    lookup_memory.remember(key, answer)
    return answer


def _asking(request: TuneRequest) -> str:
    """The name of the stage: whom a run asks, and what."""
    engine = request.adapter.find()
    version = "" if engine is None else f" {engine.version_text}"
    return f"asking {request.adapter.TITLE}{version} what it runs today"


class _RememberingProbe:
    """A probe that keeps its answer."""

    def __init__(self, probe: ProbeLike) -> None:
        self._probe = probe
        self.result: LookupResult | None = None

    def answer(self, question: LookupRequest) -> LookupResult:
        self.result = self._probe.answer(question)
        return self.result

    def close(self) -> None:
        self._probe.close()


def run(request: TuneRequest, progress: Progress) -> TuneOutcome:
    """Do what is asked for.

    Raises:
        MoEExtError: any of ours. Nothing is half-written then; what a failed proof is about stays, and it says so.
    """
    engine = request.adapter.find()
    destination = target_of(request, engine)
    source = kernel_source(engine, request.adapter)
    triton = installed.running_triton() or ""
    kept = plan.prune_space(request.problem).kept
    for place in itertools.chain.from_iterable(of.values() for of in _table_files(request, destination, triton)):
        merge.read(place)  # what cannot be merged is better known before the work than after it
    kernel_table.read(_plans_file(request, triton))
    with ExitStack() as processes:

        def ask_later(environment: dict[str, str]) -> ProbeLike:
            return processes.enter_context(
                closing(request.adapter.start_probe(verify_install.environment(environment)))
            )

        environment_today = {} if destination is None else destination.environment_today
        today = None if engine is None else _RememberingProbe(ask_later(environment_today))
        read_by_engine = None if engine is None else destination
        # A measuring run has cores to spare for an engine that gets ready meanwhile; a predicting one needs them all.
        proof = ask_later(read_by_engine.environment) if read_by_engine and request.measuring else None
        if request.measuring is not None and today is not None:
            folder = processes.enter_context(session.open_run(request, request.measuring, source))
            found = session.measure(request, request.measuring, folder, kept, today, source, progress)
            results: Results = found.pairs
            plans = found.plans
        else:
            folder, plans = None, {}
            results = _predict(request, kept, destination, today, source, progress)
        progress("writing", 0, 1)
        circumstances = results_to_tables.circumstances(request, engine, source.name)
        stored = _write_tables(request, results, circumstances, destination, triton)
        own = _write_plans(
            request,
            results_to_tables.plans_table(plans, _decided_tokens(request, engine, results), circumstances),
            triton,
        )
        progress("writing", 1, 1)
        if folder is not None:
            folder.finish()
        answer = None
        if read_by_engine is not None:
            proof = proof or ask_later(read_by_engine.environment)
            answer = _prove(request, stored, read_by_engine, proof, progress)
    return TuneOutcome(
        results=results,
        plans=plans,
        written=(*(path for path, result in stored.items() if isinstance(result, StoredTable)), *own),
        refused={path: result.why for path, result in stored.items() if isinstance(result, RefusedTable)},
        destination=destination,
        answer=answer,
        kernel=source,
        today=None if today is None else today.result,
    )


def _refuse_to_shadow(engine: str, answer: LookupResult) -> None:
    """A prediction under the running Triton's name would hide a table that was measured under another's.

    Raises:
        EngineError: the engine has a measured table for this layer.
    """
    for file in answer.files:
        known = provenance.read(file)
        if known is None or any(entry.origin == "measured" for entry in known.entries.values()):
            raise EngineError(
                f"{engine} already has a measured table for this layer, {file}: a prediction never replaces one; "
                "tune on the GPU itself, or write elsewhere with --output-dir"
            )


def _predict(
    request: TuneRequest,
    kept: tuple[TileConfig, ...],
    destination: InstallTarget | None,
    today: ProbeLike | None,
    source: KernelSource,
    progress: Progress,
) -> dict[int, PredictedConfig]:
    if today is not None:
        progress(_asking(request), 0, 1)
        answer = today.answer(verify_install.lookup_request(request))
        progress(_asking(request), 1, 1)
        is_new_folder = destination is not None and not destination.is_there
        if not (request.output_dir is not None and is_new_folder):
            _refuse_to_shadow(request.adapter.TITLE, answer)
    cache = CompileCache(default_path())
    return predict.predict_table(
        kept,
        request.problem,
        request.tokens,
        lambda jobs: compile_all(source, jobs, cache=cache, progress=lambda done, of: progress("compiling", done, of)),
    )


def _write_tables(
    request: TuneRequest, results: Results, run_of: provenance.TuningRun, destination: InstallTarget | None, triton: str
) -> dict[Path, StoredTable | RefusedTable]:
    ours = results_to_tables.config_tables(request, results, run_of)
    others = results_to_tables.config_tables(request, results_to_tables.for_any_engine(results), run_of)
    changes: dict[Path, StoredTable] = {}
    pairs: list[tuple[Path, Path]] = []
    for place in _table_files(request, destination, triton):
        up = place[False]
        is_ours = destination is not None and up.parent == destination.folder and destination.is_of_this_engine
        tables = ours if is_ours else others
        if tables[False].table:
            changes |= {path: tables[down] for down, path in place.items()}
            pairs += [(up, place[True])] if True in place else []
    return merge.put(changes, pairs, lambda table: request.adapter.table_text(table, triton))


def _write_plans(request: TuneRequest, table: KernelTable, triton: str) -> list[Path]:
    """Write the table of kernel plans where our plugin reads it and no engine does; the file, if there is something."""
    if not table:
        return []
    kernel_table.put(file := _plans_file(request, triton), table)
    return [file]


def _decided_tokens(request: TuneRequest, engine: InstallationLike | None, results: Results) -> Iterable[int]:
    """The batch sizes of which this run decides whether our own kernels run."""
    can_run = engine is not None and request.adapter.has_sorted_kernels(engine.version, request.gpu.sm)
    return results if request.measuring is not None and can_run else ()


def _plans_file(request: TuneRequest, triton: str) -> Path:
    up = install_target.table_names(request.adapter, request.shape, request.gpu.device_name)[False]
    return kernel_table.path_beside(install_target.store_folder(request.engine, triton) / up)


def _table_files(request: TuneRequest, destination: InstallTarget | None, triton: str) -> list[dict[bool, Path]]:
    """The up table (False), and the down table (True) where there is one, in each folder that the run writes to."""
    names = install_target.table_names(request.adapter, request.shape, request.gpu.device_name)
    folders = [] if destination is None else [destination.folder]
    stored = install_target.store_folder(request.engine, triton)
    return [{down: folder / name for down, name in names.items()} for folder in (*folders, stored)]


def _prove(
    request: TuneRequest,
    stored: dict[Path, StoredTable | RefusedTable],
    destination: InstallTarget,
    proof: ProbeLike,
    progress: Progress,
) -> LookupResult | None:
    """The engine's own answer to what was written, None where nothing was."""
    names = install_target.table_names(request.adapter, request.shape, request.gpu.device_name)
    files = {down: destination.folder / name for down, name in names.items()}
    found = {down: result.table for down, file in files.items() if isinstance(result := stored.get(file), StoredTable)}
    if found.keys() != files.keys():
        return None
    stage = f"asking {request.adapter.TITLE} what it takes now"
    progress(stage, 0, 1)
    written = verify_install.WrittenTables(found[False], files[False], found.get(True), files.get(True))
    answer = verify_install.verify(written, request, proof)
    progress(stage, 1, 1)
    return answer
