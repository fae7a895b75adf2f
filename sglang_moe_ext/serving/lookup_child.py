"""The child of `doctor`: asks the real engine as engines/sglang/lookup_child.py does, with our hooks put in.

Its answer has `plugin`, what became of our hooks, and `whys`, by M why what is taken is not the engine's own choice.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.engines import lookups
from sglang_moe_ext.engines.sglang import installation, lookup_child
from sglang_moe_ext.serving import hooks
from sglang_moe_ext.serving.overlay import Choice, Default, Engines, Ours
from sglang_moe_ext.serving.places import places


def _why(choice: Choice) -> str | None:
    match choice:
        case Ours():
            return f"{choice.place} table, entry {choice.entry}; {choice.origin}"
        case Default(why):
            return f"the engine's default: {why}"
        case Engines():
            return None


def _files(opened: list[str], taken: Mapping[int, Choice]) -> list[str]:
    """The tables that something was taken from: ours, and the engine's where its own lookup ran."""
    ours = [choice.path for choice in taken.values() if isinstance(choice, Ours)]
    ours = [file for up in ours for file in (up, up.with_name(f"{up.stem}_down.json")) if file.exists()]
    engine = installation.find()
    roots = [place.root for place in places(engine) if place.is_engines] if engine is not None else []
    is_asked = not taken or any(isinstance(choice, Engines) for choice in taken.values())
    theirs = [Path(file) for file in opened if is_asked and any(root in Path(file).parents for root in roots)]
    return list(dict.fromkeys(str(file) for file in (*ours, *theirs) if not file.name.endswith(".provenance.json")))


def main() -> int:
    """Read the question from stdin, print the answer."""
    try:
        engine, config = lookup_child.imported()
        state = hooks.attach(sys.modules[engine.layer_module], "doctor")
        request = json.load(sys.stdin)
        said: dict[str, Any] = lookup_child.answer(engine, config, request)
        taken = hooks.choices(lookups.layer_of(request), request["tokens"])
    except MoEExtError as error:
        print(error, file=sys.stderr)
        return 1
    whys = {m: why for m, choice in taken.items() if (why := _why(choice)) is not None}
    plugin = "active" if state.is_active else f"off: {state.why}"
    print(json.dumps({**said, "plugin": plugin, "whys": whys, "files": _files(said["files"], taken)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
