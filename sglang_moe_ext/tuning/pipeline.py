"""The order of a run: ask what the engine takes today, predict or measure, write, prove the pick-up."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from sglang_moe_ext.core import EngineError, Table, TileConfig
from sglang_moe_ext.engines import installed_engines, lookup_cache
from sglang_moe_ext.engines.adapter import InstallationLike, ProbeLike
from sglang_moe_ext.engines.lookup_probe import LookupRequest, LookupResult
from sglang_moe_ext.gpu import specs
from sglang_moe_ext.tables import config_table, merge, plan_table, provenance
from sglang_moe_ext.tables.merge import RefusedTable, StoredTable
from sglang_moe_ext.tables.plan_table import KernelTable
from sglang_moe_ext.tuning import install_target, known_tables, results_to_tables, tune_plan, verify_install
from sglang_moe_ext.tuning.bench.messages import Pair, Runner
from sglang_moe_ext.tuning.compile.cache import CompileCache, default_path
from sglang_moe_ext.tuning.compile.kernel_source import KernelSource, kernel_source
from sglang_moe_ext.tuning.compile.pool import compile_all
from sglang_moe_ext.tuning.incumbents import pairs_of
from sglang_moe_ext.tuning.install_target import InstallTarget
from sglang_moe_ext.tuning.request import Progress, TuneRequest
from sglang_moe_ext.tuning.results_to_tables import Results
from sglang_moe_ext.tuning.run import session
from sglang_moe_ext.tuning.search import predict
from sglang_moe_ext.tuning.search.final_comparison import MeasuredChoice
from sglang_moe_ext.tuning.search.predict import PredictedConfig
from sglang_moe_ext.tuning.tune_plan import TunePlan
from sglang_moe_ext.tuning.verify_install import WrittenTables

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TuneOutcome:
    """What came of a run. `plans`: the winner where our kernels were compared with the chosen pair.

    `answer` is the engine's proof of the pick-up, `today` its answer of what it ran before; None where there is no
    engine to ask. `verify_install.is_served(answer)`: it was asked with our hooks, as a server has them.
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
    triton = installed_engines.running_triton()
    if triton is None:
        raise EngineError("no Triton is installed: `pip install triton` brings the compiler that tuning needs")
    return install_target.CHOOSERS[request.engine](request.install, request.output_dir, engine, triton)


def make_plan(request: TuneRequest, progress: Progress, *, ask: bool = False) -> TunePlan:
    """The plan of the run, against what the engine takes today; nothing is written anywhere.

    `ask`: start the engine, also where its lookup can be run from its files alone.

    Raises:
        MoEExtError: the engine, the store or the model refuses.
    """
    if request.adapter.find() is None:
        return tune_plan.make_plan(request, None)
    key = lookup_cache.key_of(request.adapter.find(), verify_install.todays_request(request), request.gpu.device_name)
    answer = lookup_cache.recall(key)  # where nothing that the engine could read has changed
    if answer is None and not ask:
        answer = _read_today(request)
    if answer is None:
        with closing(request.adapter.start_probe(verify_install.environment({}))) as probe:
            answer = _ask_today(request, probe, progress)
        lookup_cache.remember(key, answer)
    return tune_plan.make_plan(request, answer)


def _read_today(request: TuneRequest) -> LookupResult | None:
    """What the engine's lookup takes, run from its files; None where that needs the whole engine, or the GPU here."""
    if request.gpu_is_here and request.gpu.device_name not in specs.known_gpus():
        return None
    question = LookupRequest(request.shape, request.tokens, request.gpu)
    try:
        with closing(request.adapter.start_reader(verify_install.environment({}))) as reader:
            return reader.answer(question)
    except EngineError:
        return None


def _ask_today(request: TuneRequest, probe: ProbeLike, progress: Progress) -> LookupResult:
    return _ask(request, "what it runs today", lambda: probe.answer(verify_install.todays_request(request)), progress)


def _ask(request: TuneRequest, what: str, answer: Callable[[], T], progress: Progress) -> T:
    """The answer; the name of the stage says whom the run asks, and what."""
    engine = request.adapter.find()
    stage = f"asking {request.adapter.TITLE}{'' if engine is None else f' {engine.version_text}'} {what}"
    progress(stage, 0, 1)
    said = answer()
    progress(stage, 1, 1)
    return said


def run(request: TuneRequest, progress: Progress) -> TuneOutcome:
    """Do what is asked for.

    Raises:
        MoEExtError: the run failed. No file is half-written; after a failed proof the tables stay, as the error says.
    """
    engine = request.adapter.find()
    destination = target_of(request, engine)
    source = kernel_source(engine, request.adapter)
    triton = installed_engines.running_triton() or ""
    kept = tune_plan.prune_space(request.problem).kept
    install_target.check_store(request.engine, triton)
    for place in itertools.chain.from_iterable(of.values() for of in _table_files(request, destination, triton)):
        merge.read(place)  # what cannot be merged is better known before the work than after it
    plan_table.read(_plans_file(request, triton))
    if request.measuring is None and not request.force:
        _refuse_known(request)
    with ExitStack() as processes:
        probe: ProbeLike | None = None
        if engine is not None:
            probe = processes.enter_context(closing(request.adapter.start_probe(verify_install.environment({}))))
        today: list[LookupResult] = []

        def ask_today() -> LookupResult:
            assert probe is not None
            today.append(_ask_today(request, probe, progress))
            return today[-1]

        folder, plans = None, {}
        if request.measuring is not None and probe is not None:
            folder = processes.enter_context(session.open_run(request, request.measuring, source))
            found = session.measure(request, request.measuring, folder, kept, ask_today, source, progress)
            results: Results = found.pairs
            plans = found.plans
        else:
            results = _predict(request, kept, None if probe is None else ask_today, source, progress)
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
        if destination is not None and probe is not None:
            answer = _prove(request, stored, destination, triton, processes, probe, progress)
    return TuneOutcome(
        results=results,
        plans=plans,
        written=(*(path for path, result in stored.items() if isinstance(result, StoredTable)), *own),
        refused={path: result.why for path, result in stored.items() if isinstance(result, RefusedTable)},
        destination=None if destination is None else _without_harmful_note(request, destination),
        answer=answer,
        kernel=source,
        today=today[-1] if today else None,
    )


def _without_harmful_note(request: TuneRequest, destination: InstallTarget) -> InstallTarget:
    """A predicted table that the user names to the engine would hide a measured one."""
    if request.measuring is None and known_tables.find_measured(request.problem) is not None:
        return replace(destination, note=None)
    return destination


_INSTEAD = (
    "a prediction never replaces it, and a server goes on taking it: tune on the GPU itself, or predict with --force"
)


def _refuse_known(request: TuneRequest) -> None:
    """Raises EngineError where a server would take a measured table, whatever is predicted."""
    if known := known_tables.find_measured(request.problem):
        whose, file = known
        raise EngineError(f"a measured table for this layer is {whose}, {file}: {_INSTEAD}")


def _refuse_to_shadow(engine: str, answer: LookupResult) -> None:
    """A prediction under the running Triton's name would hide a table that was measured under another's.

    Raises:
        EngineError: the engine has a measured table for this layer.
    """
    for file in answer.files:
        known = provenance.read(file)
        if known is None or any(entry.origin == "measured" for entry in known.entries.values()):
            raise EngineError(f"{engine} takes a measured table for this layer, {file}: {_INSTEAD}")


def _predict(
    request: TuneRequest,
    kept: tuple[TileConfig, ...],
    ask_today: Callable[[], LookupResult] | None,
    source: KernelSource,
    progress: Progress,
) -> dict[int, PredictedConfig]:
    pairs: dict[int, Pair] | None = None
    if ask_today is not None:
        answer = ask_today()
        if not request.force:
            _refuse_to_shadow(request.adapter.TITLE, answer)
        pairs = pairs_of(answer)
    cache = CompileCache(default_path())
    return predict.predict_table(
        kept,
        request.problem,
        request.tokens,
        lambda jobs: compile_all(source, jobs, cache=cache, progress=lambda done, of: progress("compiling", done, of)),
        pairs,
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
    plan_table.put(file := _plans_file(request, triton), table)
    return [file]


def _decided_tokens(request: TuneRequest, engine: InstallationLike | None, results: Results) -> Iterable[int]:
    """The batch sizes of which this run decides whether our own kernels run."""
    adapter = request.adapter
    is_taken = adapter.takes_sorted(request.shape) or adapter.takes_few_tokens(request.shape)
    can_run = engine is not None and is_taken and adapter.has_own_kernels(engine.version, request.gpu.sm)
    return results if request.measuring is not None and can_run else ()


def _plans_file(request: TuneRequest, triton: str) -> Path:
    up = install_target.table_names(request.adapter, request.shape, request.gpu.device_name)[False]
    return plan_table.path_beside(install_target.store_folder(request.engine, triton) / up)


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
    triton: str,
    processes: ExitStack,
    probe: ProbeLike,
    progress: Progress,
) -> LookupResult | None:
    """The engine's own answer to what was written, None where nothing was.

    It is asked as a server of this environment would: with our hooks, and then no variable is needed; where they are
    off, or another table stands before the written one, under the variables that make it read the folder.
    """
    names = install_target.table_names(request.adapter, request.shape, request.gpu.device_name)
    files = {down: destination.folder / name for down, name in names.items()}
    found = {down: result.table for down, file in files.items() if isinstance(result := stored.get(file), StoredTable)}
    if found.keys() != files.keys():
        return None
    copy = install_target.store_folder(request.engine, triton) / names[False]

    def tables_of(tables: Mapping[bool, Table]) -> WrittenTables:
        return WrittenTables(tables[False], files[False], tables.get(True), files.get(True))

    def read() -> WrittenTables:
        return tables_of({down: config_table.read(file) for down, file in files.items()})

    def ask() -> LookupResult:
        asked = probe
        first = asked.answer(verify_install.lookup_request(request))
        reads_ours = {files[False].resolve(), copy.resolve()} & {file.resolve() for file in first.files}
        if destination.environment and not (verify_install.is_served(first) and reads_ours):
            environment = verify_install.environment(destination.environment)
            asked = processes.enter_context(closing(request.adapter.start_probe(environment)))
        return verify_install.verify(tables_of(found), read, copy, request, asked)

    return _ask(request, "what it takes now", ask, progress)
