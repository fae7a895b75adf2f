"""The child's end of the pipe: requests come in, answers go out, a JSON document a line."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TextIO

Answers = Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]


def take_standard_output() -> TextIO:
    """What was standard output, for answers alone; all that the engine prints goes to standard error from now on."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def answer_all(out: TextIO, answers: Answers) -> None:
    """Answer `{"do": NAME, ...}` by that function until standard input ends; what it raises is an answer too."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = answers[request["do"]](request)
        except Exception as error:  # noqa: BLE001 - whatever an engine raises is what the parent wants to know
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=out, flush=True)
