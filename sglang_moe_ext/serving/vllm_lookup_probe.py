"""The child of `doctor`: asks the real vLLM as engines/vllm/lookup_probe.py does, with our hooks put in."""

from __future__ import annotations

import json
import sys

from sglang_moe_ext.core import MoEExtError
from sglang_moe_ext.engines.vllm import lookup_probe as vllm_lookup_probe
from sglang_moe_ext.engines.vllm.installation import LAYER_MODULE
from sglang_moe_ext.serving import attach
from sglang_moe_ext.serving import lookup_probe as serving_lookup_probe
from sglang_moe_ext.serving.vllm_hooks import table_dirs


def main() -> int:
    """Read the question from stdin, print the answer."""
    try:
        engine, module = vllm_lookup_probe.import_engine()
        attach.attach(sys.modules[LAYER_MODULE], "doctor")
        request = json.load(sys.stdin)
        said = vllm_lookup_probe.look_up(engine, module, request)
        layer = vllm_lookup_probe.layer_of(request)
        print(
            json.dumps(serving_lookup_probe.add_hook_state(said, "vllm", layer, request["tokens"], table_dirs(engine)))
        )
    except MoEExtError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
