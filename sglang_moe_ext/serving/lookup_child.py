"""The child of `doctor`: asks the real engine as engines/sglang/lookup_child.py does, with our hooks put in.

Its answer has `plugin`, what became of our hooks, and `whys`, by M why what is taken is not the engine's own choice.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.engines.sglang import lookup_child
from sglang_moe_ext.serving import hooks


def main() -> int:
    try:
        engine, config = lookup_child.imported()
        state = hooks.attach(sys.modules[engine.layer_module], "doctor")
        request = json.load(sys.stdin)
        said: dict[str, Any] = lookup_child.answer(engine, config, request)
    except MoEExtError as error:
        print(error, file=sys.stderr)
        return 1
    plugin = "active" if state.is_active else f"off: {state.why}"
    print(json.dumps({**said, "plugin": plugin, "whys": hooks.whys(lookup_child.layer_of(request), request["tokens"])}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
