"""Run a script in the real engines: unpacked wheels, one folder a version, under $SGLANG_MOE_EXT_ENGINES."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO_ROOT = Path(__file__).resolve().parents[2]
ENGINES_DIR = Path(os.environ.get("SGLANG_MOE_EXT_ENGINES", REPO_ROOT / ".engines"))
ENGINE_VERSIONS = ("0.5.8", "0.5.10", "0.5.12", "0.5.15", "0.5.18", "0.5.20", "0.5.23")
HOOKED_VERSIONS = ("0.5.5", *ENGINE_VERSIONS)
"""Those that our hooks and patches are held against: 0.5.5 brought what they replace."""
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
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RUN, str(script)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**engine_environment(version), **(env or {})},
        check=False,
    )
    if done.returncode != 0:
        raise AssertionError(f"{script.name} in sglang {version}: exit {done.returncode}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])
