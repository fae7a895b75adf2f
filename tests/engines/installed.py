"""Run a script in the real engines: unpacked wheels, one folder a version, under $SGLANG_MOE_EXT_ENGINES."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from sglang_moe_ext.engines.installed_engines import parse_version
from tests.engines.fork_server import ForkServer, JoinedForkServer

REPO_ROOT = Path(__file__).resolve().parents[2]
ENGINES_DIR = Path(os.environ.get("SGLANG_MOE_EXT_ENGINES", REPO_ROOT / ".engines"))
_SGLANG, _VLLM = (os.environ.get(f"SGLANG_MOE_EXT_TEST_{engine}", "").split() for engine in ("SGLANG", "VLLM"))
"""Other releases than those of `./check`, by `tools/all_releases.py`."""
HOOKED_VERSIONS = tuple(_SGLANG) or ("0.5.5", "0.5.8", "0.5.10", "0.5.12", "0.5.15", "0.5.18", "0.5.20", "0.5.23")
"""Those that our hooks and patches are held against: 0.5.5 brought what they replace."""
ENGINE_VERSIONS = tuple(version for version in HOOKED_VERSIONS if parse_version(version) >= (0, 5, 8))
"""Those that are tuned for."""
VLLM_VERSIONS = tuple(_VLLM) or ("0.20.2", "0.25.1", "0.33.0")
_RUN = (
    "import runpy, sys; from sglang_moe_ext.engines.sglang import bootstrap; bootstrap.allow_absent_operators(); "
    "runpy.run_path(sys.argv[1], run_name='__main__')"
)
"""The compiled operators that 0.5.8 and 0.5.10 import cannot be loaded without a GPU driver."""


def engine_environment(version: str) -> dict[str, str]:
    """The environment of a process that can import SGLang `version`, and this project."""
    paths = [REPO_ROOT, ENGINES_DIR / "sglang" / version]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}


def run_in_engine(
    version: str, script: Path, request: object, *, env: dict[str, str] | None = None, timeout: float = 300
) -> Any:
    """What `script` prints as its last line, as JSON, with SGLang `version` importable and `request` as JSON on stdin.

    Raises:
        AssertionError: the script failed; carries the tail of its stderr.
    """
    environment = {**engine_environment(version), **(env or {})}
    return _last_line(["-c", _RUN, str(script)], request, environment, timeout)


@functools.cache
def _fork_server(interpret: str | None) -> ForkServer | JoinedForkServer:
    """One for interpreted children, one for the others: Triton interprets its own functions from its import on."""
    shared = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    if interpret is not None:
        shared["TRITON_INTERPRET"] = interpret
    return ForkServer.of_session(f"interpret-{interpret}", shared)


def forked_python() -> str:
    """An executable in the place of `sys.executable`, which forks the processes that ask or compile an engine."""
    return str(_fork_server(None).python)


def vllm_environment(version: str, ours: Path = REPO_ROOT) -> dict[str, str]:
    """The environment of a process that can import vLLM `version`, and our package from the folder `ours`."""
    paths = [ours, ENGINES_DIR / "vllm" / version]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "SGLANG_"))}
    here = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "VLLM_TARGET_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**inherited, **here}


def run_in_vllm(script: Path, request: object, environment: dict[str, str], *, timeout: float = 300) -> Any:
    """What `script` prints as its last line, as JSON, in that environment, with `request` as JSON on stdin.

    Raises:
        AssertionError: the script failed; carries the tail of its stderr.
    """
    return _last_line([str(script)], request, environment, timeout)


def _last_line(command: list[str], request: object, environment: dict[str, str], timeout: float) -> Any:
    done = _fork_server(environment.get("TRITON_INTERPRET")).run(command, json.dumps(request), environment, timeout)
    if done.returncode != 0:
        where = environment["PYTHONPATH"].rpartition(os.pathsep)[2]
        raise AssertionError(f"{command[-1]} in {where}: exit {done.returncode}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])
