"""The quickened interpreter, which interpreted tests run in, against Triton's own: see quick_interpreter_child.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.engines.installed import REPO_ROOT

CHILD = Path(__file__).with_name("quick_interpreter_child.py")


def test_quickened_every_operation_gives_the_same_values_types_and_errors() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", CHILD]
    child = subprocess.run(command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    plain, quick = json.loads(child.stdout.splitlines()[-1])
    assert len(plain) > 1400
    assert [pair for pair in zip(plain, quick, strict=True) if pair[0] != pair[1]] == []
