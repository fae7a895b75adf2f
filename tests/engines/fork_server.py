"""A process that has imported what every engine imports, from which the children of engine tests are forked.

Importing an engine takes 5 to 8 s of CPU time. 4.5 s of that are torch, transformers and their like, the same for each
release: 0.3 to 1.6 s are left for a child that is forked (SGLang 0.5.23 and 0.5.8, 2026-11-26, two cores). The engine
itself is never imported here, so each child meets its own release, with its own environment, for the first time.

As a script: one request a line on stdin, one answer a line on stdout. See `ForkServer`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PRELOADED = ("numpy", "torch", "transformers.modeling_utils", "fastapi", "openai", "IPython", "xgrammar")
QUICK_INTERPRETER = Path(__file__).parents[1] / "kernels" / "quick_interpreter.py"


class ForkServer:
    """Runs scripts as `python -W ignore SCRIPT` would, in children of one process. One at a time."""

    def __init__(self, environment: dict[str, str]) -> None:
        """`environment`: of the imports that all children share."""
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def run(self, arguments: list[str], given: str, environment: dict[str, str], timeout_s: float) -> Any:
        """The finished child: `returncode`, `stdout`, `stderr`.

        Args:
            arguments: as Python's own: a script and what follows, or `-c`, code and what follows.
            given: the child's stdin.

        Raises:
            subprocess.TimeoutExpired: the child took longer, and was killed with all its processes.
        """
        with tempfile.TemporaryDirectory(prefix="forked-") as folder:
            files = [str(Path(folder, name)) for name in ("stdin", "stdout", "stderr")]
            Path(files[0]).write_text(given)
            request = {"arguments": arguments, "files": files, "environment": environment, "timeout_s": timeout_s}
            assert self._process.stdin is not None and self._process.stdout is not None
            print(json.dumps(request), file=self._process.stdin, flush=True)
            status = json.loads(self._process.stdout.readline())
            out, err = (Path(name).read_text(errors="replace") for name in files[1:])
        if status is None:
            raise subprocess.TimeoutExpired(arguments, timeout_s, out, err)
        return subprocess.CompletedProcess(arguments, status, out, err)


def _become(request: dict[str, Any]) -> None:
    """Run the script of the request in this process, which was forked for it."""
    os.setsid()
    for number, name in enumerate(request["files"]):
        descriptor = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in enumerate(("r", "w", "w")))
    os.environ.clear()
    os.environ.update(request["environment"])
    script, *others = request["arguments"]
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    own = "" if script == "-c" else str(Path(script).resolve().parent)
    sys.path[:] = [own, *folders, *sys.path[1:]]
    importlib.invalidate_caches()
    if script == "-c":
        sys.argv = ["-c", *others[1:]]
        exec(compile(others[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [script, *others]
        runpy.run_path(script, run_name="__main__")


def _status(pid: int, timeout_s: float) -> int | None:
    """How the child ended; None where it had to be killed."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def main() -> None:
    """Serve until stdin ends."""
    for name in PRELOADED:
        importlib.import_module(name)
    if os.environ.get("TRITON_INTERPRET") == "1":
        runpy.run_path(str(QUICK_INTERPRETER))["quicken"]()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if (pid := os.fork()) == 0:
            return _become(request)
        print(json.dumps(_status(pid, request["timeout_s"])), flush=True)
    return None


if __name__ == "__main__":
    main()
