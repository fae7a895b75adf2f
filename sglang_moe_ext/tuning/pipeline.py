"""The order of a run: ask what the engine takes today, plan, predict or measure, write, prove the pick-up."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from sglang_moe_ext.core import EngineError
from sglang_moe_ext.engines.sglang import installation, lookup
from sglang_moe_ext.engines.sglang.installation import Installation
from sglang_moe_ext.store import merge, provenance
from sglang_moe_ext.store.merge import Refused, Stored
from sglang_moe_ext.tuning import destinations, on_gpu, pickup, plan, predict, records
from sglang_moe_ext.tuning.compile import KernelSource, compile_all
from sglang_moe_ext.tuning.compile_cache import CompileCache, default_path
from sglang_moe_ext.tuning.destinations import Destination
from sglang_moe_ext.tuning.plan import Plan
from sglang_moe_ext.tuning.predict import Predicted
from sglang_moe_ext.tuning.records import Results
from sglang_moe_ext.tuning.request import Progress, Request
from sglang_moe_ext.tuning.sources import kernel_source
from sglang_moe_ext.tuning.worker import Pair


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run. `answer` is the engine's proof of the pick-up, None where there is no engine to ask."""

    results: Results
    written: tuple[Path, ...]
    refused: dict[Path, str]
    destination: Destination | None
    answer: lookup.Answer | None
    kernel: KernelSource


def destination_of(request: Request, engine: Installation | None) -> Destination | None:
    """Where the tables will go for a server to read, or None where the user's own store is the only place.

    Raises:
        EngineError: there is no Triton, or one that no engine reads tables of.
        StoreError: an overlay is needed and cannot be made.
    """
    triton = installation.running_triton()
    if triton is None:
        raise EngineError("no Triton is installed: `pip install triton` brings the compiler that tuning needs")
    return destinations.chosen(request.install, request.output_dir, engine, triton)


def ask_incumbents(
    request: Request, engine: Installation | None, destination: Destination | None, progress: Progress
) -> lookup.Answer | None:
    """What the engine takes today from where the tables will lie, or None where there is no engine to ask."""
    if engine is None:
        return None
    progress("asking", 0, 1)
    reads_it = destination is not None and destination.folder.parent.is_dir()
    environment = destination.environment if destination is not None and reads_it else {}
    answer = pickup.ask(request.shape, list(request.tokens), request.gpu, request.gpu_is_here, environment)
    progress("asking", 1, 1)
    return answer


def pairs_of(answer: lookup.Answer) -> dict[int, Pair]:
    """The configurations of both GEMMs; without a table for the down projection the engine runs the up projection's."""
    return {m: {"up": up, "down": answer.down[m] or up} for m, up in answer.up.items()}


def plan_of(request: Request, answer: lookup.Answer | None) -> Plan:
    """The plan of the run, against what the engine takes today."""
    pairs = None if answer is None else pairs_of(answer)
    return plan.made(request.shape, request.gpu, request.tokens, pairs, measures=request.measure)


def run(
    request: Request,
    answer: lookup.Answer | None,
    made: Plan,
    destination: Destination | None,
    progress: Progress,
) -> Outcome:
    """Do what the plan says.

    Raises:
        MoEExtError: any of ours. Nothing is half-written then; what a failed proof is about stays, and it says so.
    """
    engine = installation.find()
    source = kernel_source(engine)
    triton = installation.running_triton() or ""
    for place in itertools.chain.from_iterable(_places(request, destination, triton)):
        merge.read(place)  # what cannot be merged is better known before the work than after it
    if request.measure and answer is not None:
        results: Results = on_gpu.measure_all(request, pairs_of(answer), made, source, progress)
    else:
        is_new_folder = destination is not None and not destination.folder.parent.is_dir()
        if answer is not None and not (request.output_dir is not None and is_new_folder):
            _refuse_to_shadow(answer)
        results = _predicted(request, made, source, progress)
    progress("writing", 0, 1)
    stored = _put(request, results, records.circumstances(request, engine, source.name), destination, triton)
    progress("writing", 1, 1)
    return Outcome(
        results=results,
        written=tuple(path for path, result in stored.items() if isinstance(result, Stored)),
        refused={path: result.why for path, result in stored.items() if isinstance(result, Refused)},
        destination=destination,
        answer=_proof(request, stored, destination, engine, progress),
        kernel=source,
    )


def _refuse_to_shadow(answer: lookup.Answer) -> None:
    """A prediction under the running Triton's name would hide a table that was measured under another's.

    Raises:
        EngineError: the engine has a measured table for this layer.
    """
    for file in answer.files:
        known = provenance.read(file)
        if known is None or any(entry.origin == "measured" for entry in known.entries.values()):
            raise EngineError(
                f"SGLang already has a measured table for this layer, {file}: a prediction never replaces one; "
                "tune on the GPU itself, or write elsewhere with --output-dir"
            )


def _predicted(request: Request, made: Plan, source: KernelSource, progress: Progress) -> dict[int, Predicted]:
    cache = CompileCache(default_path())
    return predict.table(
        made.sifted.kept,
        request.shape,
        request.gpu,
        request.tokens,
        lambda jobs: compile_all(source, jobs, cache=cache, progress=lambda done, of: progress("compiling", done, of)),
    )


def _put(
    request: Request, results: Results, run_of: provenance.Run, destination: Destination | None, triton: str
) -> dict[Path, Stored | Refused]:
    tables = records.tables(request, results, run_of)
    places = _places(request, destination, triton)
    changes = {path: tables[is_down] for up, down in places for is_down, path in ((False, up), (True, down))}
    return merge.put(changes, places)


def _places(request: Request, destination: Destination | None, triton: str) -> list[tuple[Path, Path]]:
    """The up and the down table in each folder that the run writes to."""
    names = destinations.table_names(request.shape, request.gpu.device_name)
    folders = [] if destination is None else [destination.folder]
    return [(folder / names[False], folder / names[True]) for folder in (*folders, destinations.store_folder(triton))]


def _proof(
    request: Request,
    stored: dict[Path, Stored | Refused],
    destination: Destination | None,
    engine: Installation | None,
    progress: Progress,
) -> lookup.Answer | None:
    if destination is None or engine is None:
        return None
    names = destinations.table_names(request.shape, request.gpu.device_name)
    up, down = (stored[destination.folder / names[which]] for which in (False, True))
    if not isinstance(up, Stored) or not isinstance(down, Stored):
        return None
    progress("proving", 0, 1)
    written = pickup.Written(up.table, down.table, destination.folder / names[False], destination.folder / names[True])
    answer = pickup.prove(written, request.shape, request.gpu, request.gpu_is_here, destination.environment)
    progress("proving", 1, 1)
    return answer
