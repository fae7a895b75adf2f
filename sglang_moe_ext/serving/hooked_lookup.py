"""The child of `doctor`: what an engine takes with our hooks in, why, and what its own lookup takes without them.

`python -m sglang_moe_ext.serving.hooked_lookup ENGINE` reads a request from stdin, as the probes of engines/ do.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_moe_ext.core import EngineError, MoEShape, Projection, Quantization
from sglang_moe_ext.engines import lookup_probe, probe_child, running_engine
from sglang_moe_ext.engines.lookup_args import LookupLayer
from sglang_moe_ext.serving import attach
from sglang_moe_ext.serving.attach import Engine
from sglang_moe_ext.serving.guard import ConfigGuard, EntryChange
from sglang_moe_ext.serving.table_search import TableDir
from sglang_moe_ext.serving.table_selection import Choice, EngineDefault, EngineEntry, OurEntry
from sglang_moe_ext.tables import config_table
from sglang_moe_ext.untrusted import show

Answer = dict[str, Any]


def add_hook_state(
    said: Mapping[str, Any], engine: Engine, layer: LookupLayer, tokens: Sequence[int], table_dirs: Iterable[TableDir]
) -> Answer:
    """The answer with `plugin`, the state of our hooks, and `whys`, by M why it is not the engine's own choice.

    `said` may have `paths`, by M the kernel plan that runs in place of the engine's kernels, which all else is about.
    """
    state, taken = attach.state(engine), attach.choices(layer, tokens, engine)
    errors = said.get("alone_errors", {})
    whys = {m: why for m, choice in taken.items() if (why := _why(choice, errors.get(m))) is not None}
    plugin = "active" if state.is_active else f"off: {state.why}"
    files, remarks = _files(said["files"], taken, table_dirs), attach.remarks(layer, engine)
    return {**said, "plugin": plugin, "whys": whys, "files": files, "remarks": [*said.get("remarks", []), *remarks]}


def _why(choice: Choice, error_alone: str | None) -> str | None:
    match choice:
        case OurEntry():
            return f"{choice.table_dir} table, entry {choice.entry}; {choice.origin}"
        case EngineDefault(why):
            return f"the engine's default: {why}"
        case EngineEntry(_, instead):
            if error_alone is None:
                return None
            found = "the engine's default" if instead is None else _why(instead, None)
            return f"{found}; the engine alone raises {error_alone}"


def _files(opened: Sequence[str], taken: Mapping[int, Choice], table_dirs: Iterable[TableDir]) -> list[str]:
    """The tables that something was taken from: ours, and the engine's if its own lookup ran."""
    ours = [choice.path for choice in taken.values() if isinstance(choice, OurEntry)]
    ours = [file for up in ours for file in (up, up.with_name(f"{up.stem}_down.json")) if file.exists()]
    roots = [table_dir.root for table_dir in table_dirs if table_dir.is_engines]
    is_asked = not taken or any(isinstance(choice, EngineEntry) for choice in taken.values())
    theirs = [Path(file) for file in opened if is_asked and any(root in Path(file).parents for root in roots)]
    return list(dict.fromkeys(str(file) for file in (*ours, *theirs) if config_table.is_table(file.name)))


def describe_changes(changes: Mapping[int, Mapping[Projection, EntryChange]]) -> Answer:
    """`written` and `fitted`, by M and projection: the entry as its table has it, and why another one runs."""
    return {
        "written": {m: {of: dict(change.written) for of, change in by.items()} for m, by in changes.items() if by},
        "fitted": {m: {of: change.why for of, change in by.items()} for m, by in changes.items() if by},
    }


def ask_alone(tokens: Sequence[int], look_up: Callable[[int], Mapping[str, Any]]) -> Answer:
    """`alone` and `alone_errors`: what the engine's own lookup returns by M, or the error that it raises."""
    alone: dict[int, Any] = {}
    errors: dict[int, str] = {}
    for m in tokens:
        try:
            alone[m] = dict(look_up(m))
        except Exception as error:  # noqa: BLE001, PERF203 - whatever it is, it is the answer
            errors[m] = f"{type(error).__name__}: {show(error)}"
    return {"alone": alone, "alone_errors": errors}


def look_up_sglang(loaded: tuple[Any, Any], request: dict[str, Any], *, from_files: bool = False) -> Answer:
    """What SGLang takes in a server with our hooks."""
    from sglang_moe_ext.engines.sglang import lookup_probe as sglang_lookup_probe
    from sglang_moe_ext.serving.sglang_hooks import check_config_dir, table_dirs

    engine, config = loaded
    layer, tokens = lookup_probe.layer_of(request), request["tokens"]
    take = sglang_lookup_probe.take if from_files else sglang_lookup_probe.look_up
    said = take(engine, config, request)
    if paths := attach.kernel_plans(layer, tokens):
        attach.decline_plan(layer)
        said = {**take(engine, config, request), "paths": paths}
    said |= {"remarks": [] if layer.shape is None else check_config_dir(layer.shape, said["device_name"], engine)}
    resolver = attach.sglang_resolver()
    if resolver is not None:
        said |= describe_changes({m: resolver.changes(layer, m) for m in tokens})
        rest = layer.top_k, layer.dtype
        block = request["block_shape"]
        lookup = resolver.engine.lookup
        said |= ask_alone(tokens, lambda m: lookup(layer.w1_shape, layer.w2_shape, *rest, m, block_shape=block))
    return add_hook_state(said, "sglang", layer, tokens, table_dirs(engine))


def look_up_vllm(loaded: tuple[Any, Any], request: dict[str, Any]) -> Answer:
    """What vLLM takes in a server with our hooks, and what its launches run of that."""
    from sglang_moe_ext.engines.vllm import lookup_probe as vllm_lookup_probe
    from sglang_moe_ext.serving.vllm_hooks import fit_launch, table_dirs

    engine, module = loaded
    layer, tokens = vllm_lookup_probe.layer_of(request), request["tokens"]
    said = vllm_lookup_probe.look_up(engine, module, request)
    resolver = attach.vllm_resolver()
    if resolver is not None:
        changes = {m: dict(resolver.changes(layer, m)) for m in tokens}
        guard = ConfigGuard(engine.version, running_engine.running_gpu(said["device_name"]), "vllm")
        shape = _stated_shape(request, layer)
        for m in tokens:
            taken = said["taken"][m]
            runs = None if shape is None else fit_launch(guard, taken["up"], shape)
            if runs is not None and runs.why is not None:
                written = changes[m]["up"].written if "up" in changes[m] else taken["up"]
                changes[m] = {"up": EntryChange(written, runs.why)}
                said["taken"][m] = {"up": runs.entry, "down": taken["down"]}
        said |= describe_changes(changes)
        said |= ask_alone(tokens, lambda m: resolver.ask_alone(layer, m, request["block_shape"]))
    return add_hook_state(said, "vllm", layer, tokens, table_dirs(engine))


def _stated_shape(request: Mapping[str, Any], layer: LookupLayer) -> MoEShape | None:
    """The layer with the scheme that was stated, which vLLM's lookup is not always told."""
    if layer.shape is None:
        return None
    block = request["block_shape"]
    quantization = Quantization(request["scheme"], None if block is None else tuple(block), request["per_channel"])
    experts, size, hidden = request["experts"], layer.shape.intermediate_size, request["hidden_size"]
    return MoEShape(experts, size, hidden, request["top_k"], quantization, gated=layer.shape.gated)


def ask_backend(engine: Engine, request: dict[str, Any] | None) -> dict[str, str] | None:
    """The backend that the engine says it runs the layer by; None where it cannot say. To be asked last of all."""
    if request is None:
        return None
    if engine == "vllm":
        from sglang_moe_ext.engines.vllm.backend_probe import ask
    else:
        from sglang_moe_ext.engines.sglang.backend_probe import ask
    try:
        return ask(request)
    except EngineError:
        return None


def _load(engine: Engine, from_files: bool) -> Callable[[], tuple[Any, Any]]:
    def load() -> tuple[Any, Any]:
        loaded: tuple[Any, Any]
        if engine == "vllm":
            from sglang_moe_ext.engines.vllm import lookup_probe as vllm_lookup_probe
            from sglang_moe_ext.engines.vllm import partial_lookup as vllm_partial_lookup
            from sglang_moe_ext.engines.vllm.installation import LAYER_MODULE

            loaded = vllm_partial_lookup.load() if from_files else vllm_lookup_probe.import_engine()
            attach.attach(sys.modules[LAYER_MODULE], "doctor")
            return loaded
        from sglang_moe_ext.engines.sglang import lookup_probe as sglang_lookup_probe
        from sglang_moe_ext.engines.sglang import partial_lookup

        loaded = partial_lookup.load() if from_files else sglang_lookup_probe.import_engine()
        attach.attach(sys.modules[loaded[0].layer_module], "doctor")
        return loaded

    return load


def main(arguments: Sequence[str]) -> int:
    """`arguments`: the engine's name, and `from-files` where the rest of the engine is not to be imported."""
    from_files = lookup_probe.FROM_FILES in arguments
    engine: Engine = "vllm" if "vllm" in arguments else "sglang"
    look_up = look_up_vllm if engine == "vllm" else functools.partial(look_up_sglang, from_files=from_files)

    def answer(loaded: tuple[Any, Any], request: dict[str, Any]) -> Answer:
        said = look_up(loaded, request)
        backend = None if from_files else ask_backend(engine, request["backend"])
        return {**said, "is_from_files": from_files, "backend": backend}

    return probe_child.answer_stdin(_load(engine, from_files), answer)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
