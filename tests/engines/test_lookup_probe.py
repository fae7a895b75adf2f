"""The process that waits to be asked for a lookup, whatever its engine says meanwhile."""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path

import pytest

from sglang_moe_ext.core import EngineError, MoEShape
from sglang_moe_ext.engines.lookup_probe import LookupRequest
from sglang_moe_ext.engines.sglang import lookup_probe
from tests.engines.installed import REPO_ROOT

CHATTER = """
import os, sys
open(os.environ["SAID_IT_ALL"] + ".hub", "w").write(os.environ.get("HF_HUB_OFFLINE", ""))
for stream in (sys.stdout, sys.stderr):
    print("loading " * 100_000, file=stream, flush=True)
open(os.environ["SAID_IT_ALL"], "w").close()
"""
PATIENCE_S = 60.0


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a process that says more than a pipe holds before it reads its question, and has no engine."""
    (tmp_path / "sitecustomize.py").write_text(CHATTER)
    said = {"SAID_IT_ALL": str(tmp_path / "said"), "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO_ROOT}"}
    return {**os.environ, **said}


def test_a_chatty_engine_is_ready_before_it_is_asked(environment: dict[str, str]) -> None:
    with closing(lookup_probe.ALONE.start(environment)):
        end = time.monotonic() + PATIENCE_S
        while not (said := Path(environment["SAID_IT_ALL"]).exists()) and time.monotonic() < end:
            time.sleep(0.02)
    assert said
    assert Path(f"{environment['SAID_IT_ALL']}.hub").read_text() == "1", "0.5.6.post2 asks the hub for any model"


def test_the_last_line_of_a_chatty_engine_is_the_reason(environment: dict[str, str]) -> None:
    with pytest.raises(EngineError, match=r"^SGLang's own table lookup failed: SGLang is not installed in this env"):
        lookup_probe.ALONE.start(environment).answer(LookupRequest(MoEShape(8, 64, 64, 2), (1,)))


def test_a_process_that_was_not_asked_ends_when_it_is_closed(environment: dict[str, str]) -> None:
    asked = lookup_probe.ALONE.start(environment)
    asked.close()
    assert asked._child.returncode is not None
