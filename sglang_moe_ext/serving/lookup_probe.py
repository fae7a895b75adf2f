"""What our hooks add to an engine's answer of which entry it takes: whether they are in, and why they chose so."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.engines import lookup_probe
from sglang_moe_ext.engines.lookup_args import LookupLayer
from sglang_moe_ext.engines.sglang import lookup_probe as sglang_lookup_probe
from sglang_moe_ext.serving import attach
from sglang_moe_ext.serving.attach import Engine
from sglang_moe_ext.serving.selection import Choice, EngineDefault, EngineEntry, OurEntry
from sglang_moe_ext.serving.sglang_hooks import table_dirs
from sglang_moe_ext.serving.table_search import TableDir
from sglang_moe_ext.tables import config_table


def add_hook_state(
    said: Mapping[str, Any], engine: Engine, layer: LookupLayer, tokens: Sequence[int], table_dirs: Iterable[TableDir]
) -> Any:
    """The answer with `plugin`, what became of our hooks, and `whys`, by M why it is not the engine's own choice.

    `said` may have `paths`, by M the path that runs in place of the engine's own kernels, which all else is about.
    """
    state, taken = attach.state(engine), attach.choices(layer, tokens, engine)
    whys = {m: why for m, choice in taken.items() if (why := _why(choice)) is not None}
    plugin = "active" if state.is_active else f"off: {state.why}"
    return {**said, "plugin": plugin, "whys": whys, "files": _files(said["files"], taken, table_dirs)}


def _why(choice: Choice) -> str | None:
    match choice:
        case OurEntry():
            return f"{choice.table_dir} table, entry {choice.entry}; {choice.origin}"
        case EngineDefault(why):
            return f"the engine's default: {why}"
        case EngineEntry():
            return None


def _files(opened: Sequence[str], taken: Mapping[int, Choice], table_dirs: Iterable[TableDir]) -> list[str]:
    """The tables that something was taken from: ours, and the engine's where its own lookup ran."""
    ours = [choice.path for choice in taken.values() if isinstance(choice, OurEntry)]
    ours = [file for up in ours for file in (up, up.with_name(f"{up.stem}_down.json")) if file.exists()]
    roots = [table_dir.root for table_dir in table_dirs if table_dir.is_engines]
    is_asked = not taken or any(isinstance(choice, EngineEntry) for choice in taken.values())
    theirs = [Path(file) for file in opened if is_asked and any(root in Path(file).parents for root in roots)]
    return list(dict.fromkeys(str(file) for file in (*ours, *theirs) if config_table.is_table(file.name)))


def main() -> int:
    """Read the question from stdin, print the answer."""
    try:
        engine, config = sglang_lookup_probe.import_engine()
        attach.attach(sys.modules[engine.layer_module], "doctor")
        request = json.load(sys.stdin)
        said = sglang_lookup_probe.look_up(engine, config, request)
        layer, tokens = lookup_probe.layer_of(request), request["tokens"]
        if paths := {m: str(path) for m, path in attach.kernel_plans(layer, tokens).items() if path is not None}:
            attach.decline_plan(layer)
            said = {**sglang_lookup_probe.look_up(engine, config, request), "paths": paths}
        print(json.dumps(add_hook_state(said, "sglang", layer, tokens, table_dirs(engine))))
    except MoEExtError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
