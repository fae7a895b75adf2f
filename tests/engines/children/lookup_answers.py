"""Child of test_engine_answers: what the engine on PYTHONPATH takes with our hooks in, asked as `doctor` asks it.

stdin: {"engine": "sglang" or "vllm", "requests": [what `lookup_probe.request_of` makes, ...], "backends": [of some more
requests the part of that name, ...]}. Last line of stdout: {"answers": [...], "backends": [...]}, in that order.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

from sglang_moe_ext.serving import hooked_lookup


def in_a_fork(look_up: Any, loaded: Any, request: Any) -> Any:
    """The answer of a process that has looked nothing up, as the probe's own server forks one."""
    with tempfile.TemporaryFile("w+") as said:
        if not (pid := os.fork()):
            json.dump(look_up(loaded, request), said)
            said.flush()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        said.seek(0)
        return json.load(said)


def ask_all(engine: Any, requests: list[Any]) -> list[Any]:
    return [hooked_lookup.ask_backend(engine, request) for request in requests]


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    loaded = hooked_lookup._load(asked["engine"], False)()
    look_up = {"sglang": hooked_lookup.look_up_sglang, "vllm": hooked_lookup.look_up_vllm}[asked["engine"]]
    answers = [in_a_fork(look_up, loaded, request) for request in asked["requests"]]
    backends = {}
    for sm in {request["sm"] for request in asked["backends"]}:
        of_gpu = [place for place, request in enumerate(asked["backends"]) if request["sm"] == sm]
        requests = [asked["backends"][place] for place in of_gpu]
        backends |= dict(zip(of_gpu, in_a_fork(ask_all, asked["engine"], requests), strict=True))
    print(json.dumps({"answers": answers, "backends": [backends[it] for it in sorted(backends)]}))
