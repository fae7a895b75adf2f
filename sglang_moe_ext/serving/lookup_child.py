"""The child of `doctor`: asks the real SGLang as engines/sglang/lookup_child.py does, with our hooks put in."""

from __future__ import annotations

import json
import sys

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.engines import lookups
from sglang_moe_ext.engines.sglang import lookup_child
from sglang_moe_ext.serving import as_served, hooks
from sglang_moe_ext.serving.places import places


def main() -> int:
    """Read the question from stdin, print the answer."""
    try:
        engine, config = lookup_child.imported()
        hooks.attach(sys.modules[engine.layer_module], "doctor")
        request = json.load(sys.stdin)
        said = lookup_child.answer(engine, config, request)
        layer, tokens = lookups.layer_of(request), request["tokens"]
        if paths := {m: str(path) for m, path in hooks.paths(layer, tokens).items() if path is not None}:
            hooks.decline_path(layer)
            said = {**lookup_child.answer(engine, config, request), "paths": paths}
        print(json.dumps(as_served.added(said, "sglang", layer, tokens, places(engine))))
    except MoEExtError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
