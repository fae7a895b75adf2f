"""The child of `doctor`: asks the real vLLM as engines/vllm/lookup_child.py does, with our hooks put in."""

from __future__ import annotations

import json
import sys

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.engines.vllm import lookup_child
from sglang_moe_ext.engines.vllm.installation import LAYER_MODULE
from sglang_moe_ext.serving import as_served, hooks
from sglang_moe_ext.serving.vllm_places import places


def main() -> int:
    """Read the question from stdin, print the answer."""
    try:
        engine, module = lookup_child.imported()
        hooks.attach(sys.modules[LAYER_MODULE], "doctor")
        request = json.load(sys.stdin)
        said = lookup_child.answer(engine, module, request)
        layer = lookup_child.layer_of(request)
        print(json.dumps(as_served.added(said, "vllm", layer, request["tokens"], places(engine))))
    except MoEExtError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
